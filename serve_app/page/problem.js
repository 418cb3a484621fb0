// How sending a video goes: being sent, refused and why, held back while the service is full.
// Owns the form's message and the state of its button. Knows nothing about what was asked for.

import { sentence } from "./words.js";

const $ = (id) => document.getElementById(id);
const form = $("maker");

let countdown = 0; // a timer's id while the service is full

export function isHeldBack() {
  return $("submit").getAttribute("aria-disabled") === "true";
}

export function showBusy(isBusy) {
  form.setAttribute("aria-busy", isBusy);
  if (!countdown) setButton(isBusy ? "Sending" : "Make video", isBusy);
}

export function hideProblem() {
  $("problem").hidden = true;
  for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

export function showProblem(failure) {
  let text = sentence(failure.message);
  if (failure.status === 0) text = "The service cannot be reached. Nothing you wrote is lost: try again.";
  if (failure.status === 401) text = "The video was not sent: the service needs an API key.";
  if (failure.status === 429) {
    text = "The service is full: it has as many videos waiting as it takes.";
    waitFor(failure.retryAfterS ?? 10);
  }
  $("problem").textContent = text;
  $("problem").hidden = false;
  $("problem").scrollIntoView({ block: "nearest" });
  const field = form.querySelector(`[name="${CSS.escape(failure.param?.split(".")[0] ?? "")}"]`);
  if (field) {
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }
}

// Counts the seconds of a Retry-After down on the button. Not disabled outright: focus stays on it.
function waitFor(seconds) {
  clearInterval(countdown);
  const until = Date.now() + seconds * 1000;
  const tick = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    if (left > 0) return setButton(`Try again in ${left} s`, true);
    clearInterval(countdown);
    countdown = 0;
    setButton("Make video", false);
    if (!$("problem").hidden) $("problem").textContent = "There may be room again: try now.";
  };
  countdown = setInterval(tick, 250);
  tick();
}

function setButton(words, isHeld) {
  if ($("submit").textContent !== words) $("submit").textContent = words;
  $("submit").setAttribute("aria-disabled", isHeld);
}
