// The form: what it offers (models, their defaults, this service's options), what it sends.
// Owns the request for a video, as a new one, a remix or a branch. Knows nothing about the list.

import { apiKey, Failure, json, ROOT } from "./api.js";
import { curlCommand, formFields } from "./curl.js";
import { copy } from "./dialogs.js";
import { chosenImages, clearImages, showImages, startImages } from "./images.js";
import { hideProblem, isHeldBack, showBusy, showProblem } from "./problem.js";

const $ = (id) => document.getElementById(id);
const form = $("maker");
const TEXTS = ["prompt", "negative_prompt", "size", "seed"];
const NUMBERS = ["num_frames", "num_inference_steps"];
const SWITCHES = ["prompt_extend", "preview"];
const OF_THE_SOURCE = ["size", ...NUMBERS, "preview"]; // what a branch cannot change
const IMAGE_NEEDS = {
  t2v: {},
  i2v: { input_reference: "required", last_image: "optional" },
  ti2v: { input_reference: "optional" },
};
// What a video's answer says that the form has no field for: a repeat must not lose it.
const CARRIED = [
  "fps", "guidance_scale", "guidance_scale_2", "flow_shift", "boundary_ratio", "solver",
  "cache",
];

let models = [];
let onMade = () => {};
let origin = null; // {kind: "remix" | "branch", video, settings}

export function startForm(whenMade) {
  onMade = whenMade;
  startImages(describe);
  $("submit").disabled = false; // until now the browser would have sent the form by itself
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  form.addEventListener("reset", () => {
    clearImages();
    setOrigin(null);
    hideProblem();
    setTimeout(describe); // after the browser has emptied the fields
  });
  form.addEventListener("input", describe);
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  $("form-curl").addEventListener("click", () => {
    const { fields, images } = read();
    copyCurl(fields, Object.fromEntries(Object.entries(images).map(([n, f]) => [n, f.name])));
  });
  $("origin-drop").addEventListener("click", () => {
    setOrigin(null);
    $("prompt").focus();
  });
}

// ------------------------------------------------------------------------------- what it offers

export async function loadOffers() {
  models = (await json("models")).data;
  const chosen = form.elements.model.value;
  form.elements.model.replaceChildren(...models.map(({ id }) => new Option(id, id)));
  form.elements.model.disabled = false;
  if (models.some(({ id }) => id === chosen)) form.elements.model.value = chosen;
  describe();
  await offerCinematography();
}

async function offerCinematography() {
  if ($("cinema-fields").childElementCount) return;
  const vocabulary = (await json("cinematography")).fields;
  for (const [name, { description, values }] of Object.entries(vocabulary)) {
    const field = document.createElement("div");
    field.className = "field";
    const label = document.createElement("label");
    const select = document.createElement("select");
    select.id = label.htmlFor = `cinema-${name}`;
    select.dataset.cinema = name;
    label.textContent = capital(name);
    label.title = description;
    select.append(new Option("Any", ""), ...values.map((value) => new Option(capital(value), value)));
    field.append(label, select);
    $("cinema-fields").append(field);
  }
  $("cinema").hidden = $("cinema-fields").childElementCount === 0;
}

const capital = (name) => (name.charAt(0).toUpperCase() + name.slice(1)).replaceAll("_", " ");

const model = () => models.find(({ id }) => id === form.elements.model.value) ?? null;

// Everything on the form that follows from what is chosen.
function describe() {
  const current = model();
  if (!current) return;
  const { elements } = form;
  const isBranch = origin?.kind === "branch";
  showImages(isBranch ? {} : (IMAGE_NEEDS[current.task] ?? {}));
  for (const name of OF_THE_SOURCE) elements[name].disabled = isBranch;
  elements.seed.placeholder = isBranch ? "the original's" : "random";
  elements.size.placeholder = current.size;
  const [width, height] = current.size.split("x");
  const sizes = new Set([current.size, `${height}x${width}`]);
  $("sizes").replaceChildren(...[...sizes].map((size) => new Option(size, size)));
  $("size-hint").textContent =
    "input_reference" in chosenImages() ? "An area: the image decides the shape" : "Width x height";
  for (const name of NUMBERS) elements[name].placeholder = current[name];
  elements.num_frames.max = current.max_num_frames;
  offer("prompt_extend", current.extends_prompts);
  offer("preview", current.task !== "ti2v"); // one expert has no boundary to look at
  const numFrames = Number(elements.num_frames.value || current.num_frames);
  const seconds = ((numFrames - 1) / current.fps).toFixed(1);
  $("num_frames-hint").textContent = `${seconds} s at ${current.fps} a second`;
  const numChosen = Object.keys(cinematography()).length;
  $("cinema-count").textContent = numChosen ? `${numChosen} chosen` : "";
  describeOrigin();
}

function offer(name, isOffered) {
  form.elements[name].closest("label").hidden = !isOffered;
}

function cinematography() {
  const selects = [...form.querySelectorAll("[data-cinema]")].filter(({ value }) => value);
  return Object.fromEntries(selects.map(({ dataset, value }) => [dataset.cinema, value]));
}

// ----------------------------------------------------------------------------------- what it sends

// The request as the fields stand: {fields, images}. What is empty is the model's default.
function read() {
  const { elements } = form;
  let fields = { prompt: elements.prompt.value };
  if (elements.model.value) fields.model = elements.model.value;
  const isGiven = (name) => !elements[name].disabled && elements[name].value.trim();
  for (const name of TEXTS.filter(isGiven)) fields[name] = elements[name].value.trim();
  for (const name of NUMBERS.filter(isGiven)) fields[name] = Number(elements[name].value);
  for (const name of SWITCHES) {
    const { checked, disabled } = elements[name];
    if (checked && !disabled && !elements[name].closest("label").hidden) fields[name] = true;
  }
  const chosen = cinematography();
  if (Object.keys(chosen).length) fields.cinematography = chosen;
  if (origin?.kind === "branch") fields = branchOf(origin.video.id, fields);
  if (origin?.kind === "remix" && fields.model === origin.video.model) {
    Object.assign(fields, carriedBy(origin.video));
  }
  return { fields, images: chosenImages() };
}

// A branch takes what is left out from its source: what the form offers is said when empty, too.
function branchOf(branch_from, fields) {
  const empty = { negative_prompt: "" };
  if (!$("cinema").hidden) empty.cinematography = {};
  if (models.find(({ id }) => id === fields.model)?.extends_prompts) empty.prompt_extend = false;
  return { ...empty, ...fields, branch_from };
}

async function submit() {
  hideProblem();
  if (!form.reportValidity()) return;
  if (isHeldBack()) return;
  const { fields, images } = read();
  const asRemix = isRemix(fields, images);
  if (!asRemix && model()?.task === "i2v" && !images.input_reference && !fields.branch_from) {
    showProblem(new Failure(400, "this model animates an image: choose the first frame", {
      param: "input_reference",
    }));
    return;
  }
  showBusy(true);
  try {
    const video = asRemix ? await remix(fields) : await create(fields, images);
    setOrigin(null);
    onMade(video);
  } catch (failure) {
    if (!(failure instanceof Failure)) throw failure;
    showProblem(failure);
  } finally {
    showBusy(false);
  }
}

async function remix(fields) {
  try {
    return await post(`videos/${origin.video.id}/remix`, { prompt: fields.prompt }, {});
  } catch (failure) {
    // The original has been deleted meanwhile: its settings are all here, unless it had an image.
    if (failure.status !== 404 || model()?.task === "i2v") throw failure;
    return create(fields, {});
  }
}

const create = (fields, images) => post("videos", fields, images);

let unanswered = null; // {request, key}: sent, and nobody knows whether it arrived

// With the same Idempotency-Key, sending again after a lost answer makes no second video.
async function post(path, fields, images) {
  const files = Object.entries(images);
  const request = JSON.stringify([path, fields, files.map(([n, f]) => [n, f.name, f.size])]);
  const key = unanswered?.request === request ? unanswered.key : randomKey();
  const headers = { "Idempotency-Key": key };
  let body = JSON.stringify(fields);
  if (files.length) {
    body = new FormData();
    for (const [name, value] of formFields(fields)) body.append(name, String(value));
    for (const [name, file] of files) body.append(name, file);
  } else {
    headers["Content-Type"] = "application/json";
  }
  unanswered = { request, key };
  try {
    const video = await json(path, { method: "POST", body, headers });
    unanswered = null;
    return video;
  } catch (failure) {
    if (failure.status >= 400 && failure.status < 500) unanswered = null;
    throw failure;
  }
}

// Not randomUUID(), which exists on https and localhost only.
const randomKey = () =>
  [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");

// ------------------------------------------------------------------------------ remix and branch

// Fills the form from a video. Sent with another prompt and nothing else changed, it is a remix.
export function derive(video, kind) {
  const { elements } = form;
  form.reset();
  for (const name of [...TEXTS, ...NUMBERS, "model"]) elements[name].value = video[name] ?? "";
  if (isDefaultNegative(video)) elements.negative_prompt.value = "";
  for (const name of SWITCHES) elements[name].checked = Boolean(video[name]);
  for (const select of form.querySelectorAll("[data-cinema]")) {
    select.value = video.cinematography?.[select.dataset.cinema] ?? "";
  }
  setOrigin({ kind, video });
  describe();
  origin.settings = settings(read().fields);
  describeOrigin();
  form.scrollIntoView({ block: "start" });
  elements.prompt.focus({ preventScroll: true });
  elements.prompt.select();
}

export const isDefaultNegative = (video) =>
  video.negative_prompt === models.find(({ id }) => id === video.model)?.negative_prompt;

const carriedBy = (video) =>
  Object.fromEntries(CARRIED.filter((name) => video[name] !== null).map((name) => [name, video[name]]));

const settings = ({ prompt, ...others }) => JSON.stringify(others);

function isRemix(fields, images) {
  return (
    origin?.kind === "remix" &&
    origin.settings === settings(fields) &&
    Object.keys(images).length === 0
  );
}

function setOrigin(next) {
  origin = next;
  describe();
}

function describeOrigin() {
  $("origin").hidden = origin === null;
  if (!origin) return;
  if (origin.kind === "branch") {
    $("origin-title").textContent = "Branch";
    $("origin-text").textContent =
      "Keeps that video's layout and motion, and makes its detail again from these words or another seed.";
    return;
  }
  const { fields, images } = read();
  $("origin-title").textContent = "Remix";
  $("origin-text").textContent = isRemix(fields, images)
    ? "Same image and settings with another prompt."
    : "The settings differ, so this becomes a new video. An image must be chosen again.";
}

export function copyVideoCurl(video) {
  const names = video.branch_from
    ? ["negative_prompt", "seed", "fps", "guidance_scale_2", "cinematography"]
    : [...TEXTS, ...NUMBERS, ...CARRIED, "cinematography", "preview"];
  const fields = { prompt: video.prompt, model: video.model };
  const isSaid = (name) => ![null, false, ""].includes(video[name]); // 0 says something
  for (const name of [...names, "prompt_extend"].filter(isSaid)) fields[name] = video[name];
  if (isDefaultNegative(video)) delete fields.negative_prompt;
  const task = models.find(({ id }) => id === video.model)?.task;
  const needsImage = task === "i2v" && !video.branch_from; // the API does not give it back
  const request = video.branch_from ? branchOf(video.branch_from, fields) : fields;
  return copyCurl(request, needsImage ? { input_reference: "first-frame.png" } : {});
}

function copyCurl(fields, images) {
  const url = new URL("videos", ROOT).href;
  return copy(curlCommand(url, fields, { images, needsKey: Boolean(apiKey()) }), "Copied as curl");
}
