// One video of the list: its picture, its progress, what can be done with it.
// Owns one <li>. Is told what the video is now; knows nothing about the list or how news arrives.

import { contentUrl, loadableUrl } from "./api.js";
import { ago, queueWords, secondsLeft, sentence, stagesOf, stageWords } from "./words.js";

const template = document.getElementById("card");

export const isActive = (video) => video.status === "queued" || video.status === "in_progress";

export class Card {
  // `actions`: functions of a video: remix, branch, curl, remove, download, isDefaultNegative.
  constructor(video, actions) {
    this.element = template.content.firstElementChild.cloneNode(true);
    this.actions = actions;
    this.urls = []; // of blobs, given back with the card
    this.leftUntil = null;
    for (const name of ["remix", "branch", "curl", "remove"]) {
      this.part(name).addEventListener("click", () => actions[name](this.video, this));
    }
    this.part("download").addEventListener("click", (event) => actions.download(this.video, event));
    this.part("play").addEventListener("click", () => this.play());
    this.part("facts").addEventListener("toggle", () => this.showFacts());
    this.update(video);
  }

  part(name) {
    return this.element.querySelector(`.${name}`);
  }

  // `news` may be a whole video or the fields of an event.
  update(news) {
    const before = this.video;
    this.video = { ...before, ...news };
    const { video } = this;
    if ("seconds_left" in news) {
      this.leftUntil = news.seconds_left === null ? null : Date.now() + news.seconds_left * 1000;
    }
    this.element.firstElementChild.dataset.status = video.status;
    this.element.dataset.id = video.id;
    this.part("prompt").textContent = video.prompt;
    this.part("prompt").title = video.prompt;
    this.showMeta();
    this.showProgress();
    if (video.status !== before?.status) this.showStatus();
    if (!("num_steps" in news)) this.showFacts();
    if (isActive(video) && video.variants.includes("preview")) this.showPreview();
  }

  showMeta() {
    const { model, size, seconds, created_at } = this.video;
    const length = `${Number(seconds).toFixed(1)} s`;
    this.part("meta").textContent = [model, size, length, ago(created_at)].join(" · ");
  }

  showProgress() {
    const { video } = this;
    const bar = this.element.querySelector("progress");
    const running = video.status === "in_progress";
    this.part("running").hidden = !isActive(video);
    bar.value = video.progress;
    bar.setAttribute("aria-label", `Progress of ${video.prompt.slice(0, 80)}`);
    const names = stagesOf(video);
    const now = running ? stageWords(video.stage) : null;
    this.part("track").replaceChildren(
      ...names.map((name) => {
        const item = document.createElement("li");
        item.textContent = name;
        if (name === now) item.className = "now";
        if (running && names.indexOf(name) < names.indexOf(now)) item.className = "done";
        return item;
      }),
    );
    this.showTime();
    const notes = { queued: "Queued", in_progress: `${video.progress} %`, failed: "No video" };
    this.part("stage-note").textContent = notes[video.status] ?? "";
  }

  // The one line about now; called every second too, since the time left runs by itself.
  showTime() {
    const { video } = this;
    const left = this.leftUntil === null ? "" : secondsLeft((this.leftUntil - Date.now()) / 1000);
    let parts = [];
    if (video.status === "queued") parts = [queueWords(video.queue_position), left];
    if (video.status === "in_progress") {
      const step = /Expert/.test(video.stage) && `step ${video.step} of ${video.num_inference_steps}`;
      parts = [stageWords(video.stage), step, left];
    }
    if (video.status === "failed") parts = [sentence(video.error?.message ?? "the job failed")];
    this.part("status").textContent = parts.filter(Boolean).join(" · ");
    this.part("status").hidden = parts.length === 0;
  }

  showStatus() {
    const { video } = this;
    const completed = video.status === "completed";
    const short = video.prompt.slice(0, 60);
    this.part("play").hidden = !completed;
    this.part("play").setAttribute("aria-label", `Play ${short}`);
    this.part("download").hidden = !completed;
    this.part("download").href = contentUrl(video.id);
    this.part("download").download = `${video.id}.mp4`;
    this.part("remove").textContent = isActive(video) ? "Cancel" : "Delete";
    for (const name of ["download", "remix", "branch", "curl", "remove"]) {
      const words = this.part(name).textContent;
      this.part(name).setAttribute("aria-label", `${words}: ${short}`);
    }
    if (completed) this.showPicture("thumbnail");
  }

  showFacts() {
    const { video } = this;
    this.part("branch").hidden = !video.can_branch;
    const facts = {
      "Sent to the model": video.revised_prompt,
      "About the prompt": video.prompt_note,
      Prompt: video.prompt.length > 90 ? video.prompt : null,
      "Negative prompt": this.actions.isDefaultNegative(video) ? null : video.negative_prompt,
      Seed: video.seed,
      Frames: video.num_frames && `${video.num_frames} at ${video.fps} a second`,
      Steps: video.num_inference_steps && `${video.num_inference_steps}, ${video.solver}`,
      "Remix of": video.remixed_from_video_id,
      "Branch of": video.branch_from,
      Id: video.id,
    };
    this.element.querySelector("dl").replaceChildren(
      ...Object.entries(facts).filter(([, value]) => value).flatMap(([name, value]) => {
        const [term, text] = [document.createElement("dt"), document.createElement("dd")];
        term.textContent = name;
        text.textContent = value;
        return [term, text];
      }),
    );
  }

  async showPreview() {
    if (this.previewShown) return;
    this.previewShown = true;
    this.previewShown = await this.showPicture("preview");
  }

  // Whether there is such a picture. None yet is no failure: the box stays as it is.
  async showPicture(variant) {
    const poster = this.part("poster");
    try {
      const url = await this.load(variant);
      const picture = new Image();
      picture.src = url;
      await picture.decode();
      if (variant === "preview" && !isActive(this.video)) return true;
      poster.src = url;
      poster.alt = variant === "preview" ? "Preview of the unfinished video" : "";
      poster.hidden = false;
      this.element.firstElementChild.classList.toggle("previewed", variant === "preview");
      return true;
    } catch {
      return false;
    }
  }

  async load(variant) {
    const url = await loadableUrl(this.video.id, variant);
    if (url.startsWith("blob:")) this.urls.push(url);
    return url;
  }

  async play() {
    if (this.element.querySelector("video")) return;
    const player = document.createElement("video");
    Object.assign(player, { controls: true, loop: true, playsInline: true, muted: true });
    player.setAttribute("aria-label", `Video: ${this.video.prompt.slice(0, 80)}`);
    this.part("play").classList.add("loading");
    try {
      player.src = await this.load("video");
    } catch (failure) {
      this.part("stage-note").textContent = sentence(failure.message);
      return;
    } finally {
      this.part("play").classList.remove("loading");
    }
    player.addEventListener("error", () => {
      player.remove();
      this.part("play").hidden = false;
      this.part("stage-note").textContent = "The video cannot be played now.";
    });
    this.part("play").hidden = true;
    this.part("poster").after(player);
    player.focus();
    player.play().catch(() => {}); // the browser wants a click on the player itself
  }

  remove() {
    this.urls.forEach((url) => URL.revokeObjectURL(url));
    this.element.remove();
  }
}
