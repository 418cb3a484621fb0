// Numbers and states in a person's words. Pure: text in, text out.

const STAGES = [
  ["PromptExtender", "Prompt"],
  ["TextEncoder", "Prompt"],
  ["HighNoiseExpert", "Layout and motion"],
  ["LowNoiseExpert", "Detail"],
  ["VAE", "Decoding"],
];

// The stages that a video goes through. A model with one expert has no boundary.
export function stagesOf(video) {
  const names = [...new Set(STAGES.map(([, words]) => words))];
  return video.boundary_ratio === null ? names.filter((name) => name !== "Detail") : names;
}

// A deployment's name ("HighNoiseExpert-i2v") in words.
export function stageWords(stage) {
  return STAGES.find(([name]) => stage?.startsWith(name))?.[1] ?? stage ?? "Starting";
}

export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 90) return `${whole} s`;
  if (whole < 5400) return `${Math.round(whole / 60)} min`;
  return `${(whole / 3600).toFixed(1)} h`;
}

export function secondsLeft(seconds) {
  if (seconds === null || seconds === undefined) return "";
  return seconds < 1 ? "nearly there" : `about ${duration(seconds)} left`;
}

export function queueWords(position) {
  if (position === null || position === undefined) return "Waiting in the queue";
  if (position === 0) return "Next in the queue";
  return `Waiting, ${position} before this one`;
}

export function ago(unixS, nowS = Date.now() / 1000) {
  const past = nowS - unixS;
  if (past < 60) return "just now";
  if (past < 3600) return `${Math.floor(past / 60)} min ago`;
  if (past < 86400) return `${Math.floor(past / 3600)} h ago`;
  return new Date(unixS * 1000).toLocaleDateString(undefined, { day: "numeric", month: "short" });
}

// Sentence case and a full stop for a message of the API.
export function sentence(message) {
  const text = message.trim();
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
