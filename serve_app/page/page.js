// The page's beginning: joins the form, the list, the readiness and the key.

import { apiKey, onKeyNeeded } from "./api.js";
import { askForKey, startKeyDialog } from "./dialogs.js";
import { loadOffers, startForm } from "./form.js";
import { lock, watchReadiness } from "./readiness.js";
import { add, refresh, startVideos } from "./videos.js";

const changeKey = document.getElementById("change-key");
let declined = false; // whoever closed the question is not asked again by a request in the back

onKeyNeeded(async ({ refused }) => {
  if (declined) return false;
  const given = await askForKey({ refused });
  declined = !given;
  keyChanged();
  return given;
});

function keyChanged() {
  changeKey.hidden = !apiKey() && !declined;
  lock(declined ? enterKey : null);
}

async function enterKey() {
  if (!(await askForKey())) return;
  declined = false;
  keyChanged();
  load();
}

async function load() {
  await Promise.allSettled([loadOffers(), refresh()]);
  keyChanged();
}

startKeyDialog({ onForgotten: () => location.reload() });
changeKey.addEventListener("click", enterKey);
startForm(add);
startVideos();
watchReadiness(load);
load();
