// The list of videos: pages of them, kept true by event streams and by looking again.
// Owns which cards there are, in which order, and the streams. Knows nothing about a card's inside.

import { apiKey, Failure, json, loadableUrl, request, videoEvents } from "./api.js";
import { Card, isActive } from "./card.js";
import { confirmed, tell } from "./dialogs.js";
import { copyVideoCurl, derive, isDefaultNegative } from "./form.js";
import { sentence } from "./words.js";

const PAGE_SIZE = 20;
// A browser opens six connections to one HTTP/1.1 server: streams leave room for the rest.
const MAX_STREAMS = 3;
const RECONNECT_S = 2;
const LOOK_S = { active: 3, idle: 15 };

const $ = (id) => document.getElementById(id);
const cards = new Map(); // id -> Card, in the order of the list
const streams = new Map(); // id -> AbortController
const actions = {
  remix: (video) => derive(video, "remix"),
  branch: (video) => derive(video, "branch"),
  curl: copyVideoCurl,
  remove,
  download,
  isDefaultNegative,
};

let hasMore = false;
let changes = 0; // made here; a list asked for before the last one is old news
let timer = 0;

export function startVideos() {
  $("more").addEventListener("click", showOlder);
  document.addEventListener("visibilitychange", () => document.hidden || refresh());
  setInterval(() => cards.forEach((card) => isActive(card.video) && card.showTime()), 1000);
}

// ---------------------------------------------------------------------------------------- the list

// The newest page as it is now; what was shown beyond it stays.
export async function refresh() {
  clearTimeout(timer);
  const asOf = changes;
  try {
    const page = await json(`videos?limit=${PAGE_SIZE}`);
    if (asOf === changes) merge(page);
  } catch (failure) {
    if (!(failure instanceof Failure)) throw failure; // the banner says what is wrong
  } finally {
    const isMoving = [...cards.values()].some(({ video }) => isActive(video));
    const waitS = isMoving ? LOOK_S.active : LOOK_S.idle;
    if (!document.hidden) timer = setTimeout(refresh, waitS * 1000);
  }
}

function merge(page) {
  const newest = page.data.map(({ id }) => id);
  const shown = [...cards.keys()];
  const overlap = shown.indexOf(page.last_id);
  const older = page.has_more && overlap >= 0 ? shown.slice(overlap + 1) : [];
  const keep = new Set([...newest, ...older]);
  for (const id of shown) if (!keep.has(id)) drop(id);
  if (older.length === 0) hasMore = page.has_more;
  page.data.forEach(put);
  arrange([...newest, ...older]);
}

async function showOlder() {
  const last = [...cards.keys()].at(-1);
  $("more").disabled = true;
  try {
    const page = await json(`videos?limit=${PAGE_SIZE}&after=${last}`);
    hasMore = page.has_more;
    const shown = [...cards.keys()];
    page.data.forEach(put);
    arrange([...shown, ...page.data.map(({ id }) => id)]);
    cards.get(page.first_id)?.part("remix").focus();
  } catch (failure) {
    tell(sentence(failure.message));
  } finally {
    $("more").disabled = false;
  }
}

// A video that was made here goes on top.
export function add(video) {
  changes += 1;
  const shown = [...cards.keys()];
  put(video);
  arrange([...new Set([video.id, ...shown])]);
  tell("Your video is in the queue");
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  cards.get(video.id).element.scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
  refresh();
}

function put(video) {
  const card = cards.get(video.id);
  if (!card) cards.set(video.id, new Card(video, actions));
  else if (!isActive(card.video)) card.showMeta(); // how long ago: nothing else changes any more
  else if (!isActive(video)) finish(card, video);
  // A stream knows more than a list, in which queue_position is null, but for this.
  else card.update(streams.has(video.id) ? { can_branch: video.can_branch } : video);
}

function arrange(ids) {
  const ordered = [...new Set(ids)].filter((id) => cards.has(id)).map((id) => [id, cards.get(id)]);
  cards.clear();
  ordered.forEach(([id, card]) => cards.set(id, card));
  ordered.forEach(([, { element }], index) => {
    // Only what is out of place is moved: moving a playing video would stop it.
    const there = $("cards").children[index];
    if (there !== element) $("cards").insertBefore(element, there ?? null);
  });
  $("empty").hidden = cards.size > 0;
  $("more").hidden = !hasMore;
  follow();
}

function drop(id) {
  streams.get(id)?.abort();
  cards.get(id)?.remove();
  cards.delete(id);
}

// ------------------------------------------------------------------------------------- live news

// Streams for the videos that move: those at work, then those that are next.
function follow() {
  const active = [...cards.values()].map((card) => card.video).filter(isActive).reverse();
  const wanted = [
    ...active.filter(({ status }) => status === "in_progress"),
    ...active.filter(({ status }) => status === "queued"),
  ].slice(0, MAX_STREAMS);
  const ids = new Set(wanted.map(({ id }) => id));
  for (const [id, controller] of streams) if (!ids.has(id)) controller.abort();
  wanted.forEach(({ id }) => streams.has(id) || listen(id));
}

async function listen(id) {
  const controller = new AbortController();
  streams.set(id, controller);
  try {
    for await (const { name, data } of videoEvents(id, controller.signal)) {
      if (name === "video.deleted") drop(id);
      else if (isActive(data)) cards.get(id)?.update(data);
      else finish(cards.get(id), await json(`videos/${id}`));
    }
  } catch (failure) {
    // Cut off, aborted or gone: the next look at the list opens another one if it is still needed.
    if (failure.status === 404) drop(id);
  } finally {
    streams.delete(id);
  }
  if (cards.size === 0) arrange([]);
  if (!controller.signal.aborted) setTimeout(follow, RECONNECT_S * 1000);
}

// The list and the stream may both bring the end: it is told once.
function finish(card, video) {
  if (!card || !isActive(card.video)) return;
  card.update(video);
  tell(`${video.status === "completed" ? "Finished" : "Failed"}: ${video.prompt.slice(0, 60)}`);
}

// -------------------------------------------------------------------------------------- actions

async function remove(video) {
  const running = isActive(video);
  const sure = await confirmed({
    title: running ? "Cancel this video?" : "Delete this video?",
    text: video.prompt.slice(0, 200),
    yes: running ? "Cancel the video" : "Delete the video",
    no: running ? "Let it run" : "Keep it",
  });
  if (!sure) return;
  try {
    await request(`videos/${video.id}`, { method: "DELETE" });
  } catch (failure) {
    if (failure.status !== 404) return tell(sentence(failure.message));
  }
  changes += 1;
  const ids = [...cards.keys()];
  const next = ids[ids.indexOf(video.id) + 1];
  drop(video.id);
  arrange([...cards.keys()]);
  tell(running ? "Cancelled" : "Deleted");
  (cards.get(next)?.part("remix") ?? $("videos-title")).focus();
}

// A link sends no key: with one, the file is fetched and the link follows the copy.
async function download(video, event) {
  if (!apiKey()) return;
  event.preventDefault();
  try {
    const link = document.createElement("a");
    link.href = await loadableUrl(video.id);
    link.download = `${video.id}.mp4`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } catch (failure) {
    tell(sentence(failure.message));
  }
}
