// The service's API as functions: requests, the API key, event streams, files.
// Owns how a failure looks to the rest of the page. Knows nothing about the page itself, but for
// `askForKey`, which it is given.

const KEY_NAME = "wan-api-key";
export const ROOT = new URL("v1/", document.baseURI);

// An answer that is no success, or cannot be read. `status` 0: no answer at all.
export class Failure extends Error {
  constructor(status, message, { param = null, code = null, retryAfterS = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code, retryAfterS });
  }
}

// ----------------------------------------------------------------------------------- the API key

let askForKey = async () => null;
let asking = null; // one question, however many requests wait for it

export function onKeyNeeded(ask) {
  askForKey = ask;
}

export function apiKey() {
  return sessionStorage.getItem(KEY_NAME) || localStorage.getItem(KEY_NAME);
}

export function rememberKey(key, { onThisDevice }) {
  forgetKey();
  (onThisDevice ? localStorage : sessionStorage).setItem(KEY_NAME, key);
}

export function forgetKey() {
  sessionStorage.removeItem(KEY_NAME);
  localStorage.removeItem(KEY_NAME);
}

// ------------------------------------------------------------------------------------- requests

// The Response of a request that succeeded. Throws Failure. Asks for the key when one is needed.
export async function request(path, options = {}) {
  for (;;) {
    const key = apiKey();
    const headers = new Headers(options.headers);
    if (key) headers.set("Authorization", `Bearer ${key}`);
    let answer;
    try {
      answer = await fetch(new URL(path, ROOT), { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure(0, "the service cannot be reached");
    }
    if (answer.ok) return answer;
    const failure = await failed(answer);
    if (answer.status !== 401) throw failure;
    if (key === apiKey()) {
      asking ??= askForKey({ refused: key !== null }).finally(() => (asking = null));
      if (!(await asking)) throw failure;
    }
  }
}

const UNREADABLE = "the answer was cut off or is not the service's: try again, or reload the page";

export async function json(path, options) {
  const answer = await request(path, options);
  try {
    return parse(await answer.text());
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(answer.status, UNREADABLE);
  }
}

// Seeds have 63 bits, JavaScript's numbers 53: a seed is kept as the text it came as. Inside a
// JSON string the quotes would be escaped, so this matches no text that somebody wrote.
export function parse(text) {
  return JSON.parse(text.replace(/"seed":\s*([0-9]+)/g, '"seed":"$1"'));
}

async function failed(answer) {
  let error = {};
  try {
    error = JSON.parse(await answer.text()).error ?? {};
  } catch {
    // not this service's words: a proxy's, while the service starts
  }
  return new Failure(answer.status, error.message ?? `the service answered ${answer.status}`, {
    param: error.param,
    code: error.code,
    retryAfterS: Number(answer.headers.get("Retry-After")) || null,
  });
}

// Whether the service is ready. Throws Failure: 503 with what it waits for, 0 when unreachable.
export async function ready() {
  let answer;
  try {
    answer = await fetch(new URL("ready", document.baseURI), { cache: "no-store" });
    if (answer.ok) JSON.parse(await answer.text()); // a login page in between answers 200, too
  } catch {
    throw new Failure(0, "the service cannot be reached");
  }
  if (!answer.ok) throw await failed(answer);
}

export function contentUrl(id, variant = "video") {
  const url = new URL(`videos/${id}/content`, ROOT);
  if (variant !== "video") url.searchParams.set("variant", variant);
  return url.href;
}

// A URL that an element can load. Elements send no key: with one, the file is fetched into memory.
export async function loadableUrl(id, variant) {
  const url = contentUrl(id, variant);
  if (!apiKey()) return url;
  return URL.createObjectURL(await (await request(url)).blob());
}

// ------------------------------------------------------------------------------------- events

// The server-sent events of one video, until its stream ends. EventSource would send no key.
export async function* videoEvents(id, signal) {
  const answer = await request(`videos/${id}/events`, {
    headers: { Accept: "text/event-stream" },
    signal,
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split(/\r\n\r\n|\n\n|\r\r/);
    text = blocks.pop();
    for (const block of blocks) {
      const event = readEvent(block);
      if (event) yield event;
    }
  }
}

function readEvent(block) {
  let name = "message";
  const data = [];
  for (const line of block.split(/\r\n|\n|\r/)) {
    const [, field, value] = /^([a-z]+): ?(.*)$/.exec(line) ?? [];
    if (field === "event") name = value;
    if (field === "data") data.push(value);
  }
  return data.length ? { name, data: parse(data.join("\n")) } : null;
}
