// What the service is able to do now: ready, warming up, full, unreachable, in need of a key.
// Owns the pill in the header and the banner below it. Knows nothing about videos.

import { ready } from "./api.js";
import { sentence } from "./words.js";

const POLL_READY_S = 15;
const POLL_WAITING_S = 3;

const $ = (id) => document.getElementById(id);
const LABELS = {
  ready: "Ready",
  warming: "Warming up",
  stuck: "No storage",
  unreachable: "Unreachable",
  locked: "Key needed",
};

let state = "connecting";
let wasReady = false;
let reason = null; // the Failure that says why it is not ready
let onBack = () => {};
let timer = 0;

// `whenBack` is called each time the service answers again after it did not.
export function watchReadiness(whenBack) {
  onBack = whenBack;
  document.addEventListener("visibilitychange", () => document.hidden || look());
  window.addEventListener("online", look);
  window.addEventListener("offline", look);
  return look();
}

// Looks now, and again later.
export async function look() {
  clearTimeout(timer);
  try {
    await ready();
    show("ready");
  } catch (failure) {
    if (failure.status === 0) show("unreachable");
    else show(failure.code === "storage_unavailable" ? "stuck" : "warming", failure);
  }
  const waitS = state === "ready" || document.hidden ? POLL_READY_S : POLL_WAITING_S;
  timer = setTimeout(look, waitS * 1000);
}

// Without its key the service may well be ready, but not for this person.
let locked = null;
export function lock(unlock) {
  locked = unlock;
  show(state);
}

function show(next, failure = reason) {
  const before = state;
  state = next;
  reason = failure;
  wasReady ||= next === "ready";
  const shown = locked && next === "ready" ? "locked" : next;
  $("service").dataset.state = shown;
  setText($("service"), LABELS[shown] ?? "Connecting");
  const [title, text, action] = BANNERS[shown]?.() ?? [];
  $("banner").hidden = !title;
  if (title) banner(title, text, action);
  if (before === "unreachable" && next !== "unreachable") onBack();
}

// State -> title, text and perhaps a button's [words, action]. Others need no banner.
const BANNERS = {
  warming: () => [
    wasReady ? "A part of the service is starting again." : "The service is warming up.",
    `${sentence(reason.message)} You can send a video now: it waits in the queue.`,
  ],
  stuck: () => ["The service does not reach its storage.", "This page keeps trying."],
  unreachable: () => [
    "The service cannot be reached.",
    navigator.onLine
      ? "This page keeps trying. Accepted videos are safe and go on."
      : "This device is offline.",
    ["Try now", look],
  ],
  locked: () => [
    "This service needs an API key.",
    "Without one it shows and makes nothing.",
    ["Enter a key", locked],
  ],
};

function banner(title, text, action) {
  setText($("banner-title"), title);
  setText($("banner-text"), text);
  $("banner-action").hidden = !action;
  if (action) {
    setText($("banner-action"), action[0]);
    $("banner-action").onclick = () => action[1]();
  }
}

// A screen reader speaks up whenever a live region's text is set: only when it is another.
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
