// The page's small conversations: the API key, "are you sure", copying, and short notices.
// Owns the three <dialog>s and the toast. Knows nothing about videos.

import { apiKey, forgetKey, rememberKey } from "./api.js";

const $ = (id) => document.getElementById(id);

// ---------------------------------------------------------------------------------------- notices

let toastTimer = 0;

export function tell(text) {
  $("toast").textContent = text;
  $("toast").classList.add("shown");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => $("toast").classList.remove("shown"), 4000);
}

// ---------------------------------------------------------------------------------------- the key

// Asks for a key; true when there is one to try. `refused`: the one there was is not valid.
export function askForKey({ refused = false } = {}) {
  const dialog = $("key-dialog");
  const field = $("key");
  $("key-text").textContent = refused
    ? "That key was not accepted. Enter a valid one."
    : "This service asks for a key with every request.";
  field.value = "";
  field.setCustomValidity("");
  $("key-keep").checked = localStorage.length > 0;
  $("key-forget").hidden = !apiKey();
  if (!dialog.open) dialog.showModal();
  field.focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "use"), { once: true });
  });
}

export function startKeyDialog({ onForgotten }) {
  const dialog = $("key-dialog");
  const field = $("key");
  field.addEventListener("input", () => field.setCustomValidity(""));
  $("key-form").addEventListener("submit", (event) => {
    const key = field.value.trim();
    // A header carries nothing else, and the browser would call that a network failure.
    if (!/^[\x21-\x7e]+$/.test(key)) {
      event.preventDefault();
      field.setCustomValidity("A key has only letters, digits and signs, without spaces");
      field.reportValidity();
      return;
    }
    rememberKey(key, { onThisDevice: $("key-keep").checked });
  });
  $("key-cancel").addEventListener("click", () => dialog.close("cancel"));
  dialog.addEventListener("cancel", () => (dialog.returnValue = "cancel"));
  $("key-forget").addEventListener("click", () => {
    forgetKey();
    dialog.close("cancel");
    onForgotten();
  });
}

// ------------------------------------------------------------------------------- confirm and copy

export function confirmed({ title, text, yes, no }) {
  const dialog = $("confirm-dialog");
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm-yes").textContent = yes;
  $("confirm-no").textContent = no;
  dialog.returnValue = "no"; // what Escape leaves
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

export async function copy(text, notice) {
  try {
    await navigator.clipboard.writeText(text);
    tell(notice);
  } catch {
    // Not allowed, or not a secure context: the person copies by hand.
    $("copy-text").value = text;
    $("copy-dialog").showModal();
    $("copy-text").select();
  }
}
