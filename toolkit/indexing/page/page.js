// Records or takes a query, posts it to search.py, and shows its results: the coarse order, then the re-ranked one.
"use strict";

const $ = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");
let about = null; // the index and the limits
let query = null; // {body, url} of the last search
let search = null; // AbortController of the search in progress
let recording = null; // {recorder, stream, context, timer}

// Requests

async function ask(path, body, signal) {
  const response = await fetch(path, { method: body ? "POST" : "GET", body, signal });
  const answer = await response.json().catch(() => null);
  if (!response.ok || !answer) throw new Error(answer?.error ?? `the server answered ${response.status}`);
  return answer;
}

function say(text, failed = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", failed);
}

// Sound: what the browser decodes becomes 16-bit mono WAV, since the server reads neither WebM nor M4A

async function toWav(blob, recorded = false) {
  const context = new OfflineAudioContext(1, 1, about.sampling_rate);
  let sound;
  try {
    sound = await context.decodeAudioData(await blob.arrayBuffer());
  } catch {
    throw new Error("this browser cannot decode the file as audio");
  }
  if (sound.duration > about.max_seconds) {
    const seconds = sound.duration.toFixed(1);
    throw new Error(`${seconds} s of audio, the longest that can be searched with is ${about.max_seconds} s`);
  }
  const mono = new Float32Array(sound.length);
  for (let channel = 0; channel < sound.numberOfChannels; channel++) {
    sound.getChannelData(channel).forEach((value, n) => (mono[n] += value / sound.numberOfChannels));
  }
  return encodeWav(recorded ? withoutSilence(mono, sound.sampleRate) : mono, sound.sampleRate);
}

// Pressing the button leaves silence at both ends, which captions in training do not have: frames of 20 ms that are
// 35 dB below the loudest are cut, except the last 40 ms before speech and the first after it.
function withoutSilence(mono, rate) {
  const size = Math.round(0.02 * rate), powers = [];
  for (let start = 0; start + size <= mono.length; start += size) {
    powers.push(mono.subarray(start, start + size).reduce((sum, value) => sum + value * value, 0));
  }
  const least = Math.max(...powers) * 10 ** -3.5, loud = (power) => power >= least;
  const first = Math.max(0, powers.findIndex(loud) - 2), last = powers.findLastIndex(loud) + 3;
  return mono.subarray(first * size, last < powers.length ? last * size : mono.length);
}

function encodeWav(mono, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * mono.length));
  const text = (offset, letters) => [...letters].forEach((one, n) => view.setUint8(offset + n, one.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * mono.length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); // size of the format, then PCM of one channel
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true); // bytes a second, bytes a sample, bits a sample
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * mono.length, true);
  mono.forEach((value, n) => {
    view.setInt16(44 + 2 * n, Math.max(-32768, Math.min(32767, Math.round(value * 32768))), true);
  });
  return new Blob([view], { type: "audio/wav" });
}

async function startRecording() {
  if (!navigator.mediaDevices?.getUserMedia) {
    say("The browser gives the microphone to pages on localhost and https only: use the ssh line that search.py printed.", true);
    return;
  }
  $("record").disabled = true;
  try {
    const stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false },
    });
    const lossless = "audio/webm;codecs=pcm"; // a codec costs recall; where there is none without loss, at a high rate
    const mimeType = MediaRecorder.isTypeSupported(lossless) ? lossless : "";
    const recorder = new MediaRecorder(stream, { mimeType, audioBitsPerSecond: 256000 });
    const parts = [];
    recorder.ondataavailable = (event) => parts.push(event.data);
    recorder.onstop = () => finishRecording(new Blob(parts, { type: recorder.mimeType }));
    const begun = performance.now();
    const timer = setInterval(() => {
      const seconds = (performance.now() - begun) / 1000;
      say(`Recording: ${seconds.toFixed(1)} s`);
      if (seconds > about.max_seconds - 1) stopRecording();
    }, 100);
    recording = { recorder, stream, timer, context: new AudioContext(), keep: true };
    drawLevel();
    recorder.start();
    $("record").classList.add("recording");
    $("record").setAttribute("aria-pressed", "true");
    $("record-label").textContent = "Stop and search";
  } catch (error) {
    say(`The microphone cannot be used: ${error.message}`, true);
  }
  $("record").disabled = false;
}

function stopRecording(keep = true) {
  if (recording?.recorder.state !== "recording") return;
  recording.keep = keep;
  recording.recorder.stop();
}

function finishRecording(blob) {
  const { stream, timer, context, keep } = recording;
  clearInterval(timer);
  stream.getTracks().forEach((track) => track.stop());
  context.close();
  recording = null;
  $("level").hidden = true;
  $("record").classList.remove("recording");
  $("record").setAttribute("aria-pressed", "false");
  $("record-label").textContent = "Record";
  if (keep) run(() => toWav(blob, true));
  else say("The recording was discarded.");
}

function drawLevel() {
  const analyser = recording.context.createAnalyser();
  recording.context.createMediaStreamSource(recording.stream).connect(analyser);
  const samples = new Float32Array(analyser.fftSize), canvas = $("level"), pen = canvas.getContext("2d"), levels = [];
  canvas.hidden = false;
  const draw = () => {
    if (!recording) return;
    analyser.getFloatTimeDomainData(samples);
    levels.push(Math.max(...samples.map(Math.abs)));
    if (levels.length > canvas.width / 4) levels.shift();
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.fillStyle = getComputedStyle(document.body).getPropertyValue("--ink");
    levels.forEach((level, n) => {
      const height = Math.max(2, level * canvas.height);
      pen.fillRect(4 * n, (canvas.height - height) / 2, 3, height);
    });
    requestAnimationFrame(draw);
  };
  draw();
}

// Search

function take(file) {
  if (file) run(async () => (about.indexed === "image" ? toWav(file) : file));
}

async function run(prepare) {
  search?.abort();
  const mine = (search = new AbortController());
  say("Searching ...");
  try {
    const body = await prepare();
    if (body.size > about.max_bytes) throw new Error(`the file has more than ${about.max_bytes >> 20} MiB`);
    if (mine.signal.aborted) return;
    if (query) URL.revokeObjectURL(query.url);
    query = { body, url: URL.createObjectURL(body) };
    showQuery();
    show([]);
    const coarse = await ask("/search", body, mine.signal);
    show(coarse.results);
    const warning = coarse.warning ? `; the recording: ${coarse.warning}` : "";
    if (!about.rerank) {
      say(`${coarse.results.length} results${warning}`);
      return;
    }
    say(`Re-ranking the best ${about.rerank} ...`);
    show((await ask("/search?rerank=1", body, mine.signal)).results);
    say(`${coarse.results.length} results; the best ${about.rerank} by similarity were re-ranked${warning}`);
  } catch (error) {
    if (!mine.signal.aborted) say(`Not searched: ${error.message}`, true);
  }
}

function showQuery() {
  const shown = document.createElement(about.indexed === "image" ? "audio" : "img");
  shown.src = query.url;
  if (shown.tagName === "AUDIO") {
    shown.controls = true;
    shown.setAttribute("aria-label", "The query");
  } else shown.alt = "The query";
  $("query").replaceChildren(shown);
  $("query").hidden = false;
}

// Results that stay are moved, so that their pictures are not loaded again.
function show(results) {
  const list = $("results"), old = new Map([...list.children].map((entry) => [entry.dataset.row, entry]));
  const places = new Map([...old].map(([row, entry]) => [row, entry.getBoundingClientRect()]));
  const ranks = new Map([...old.keys()].map((row, n) => [row, n + 1]));
  const entries = results.map((hit, n) => {
    const entry = old.get(String(hit.row)) ?? makeEntry(hit);
    fill(entry, hit, n + 1, ranks.size ? ranks.get(String(hit.row)) : n + 1);
    return entry;
  });
  list.replaceChildren(...entries);
  if (calm.matches) return;
  for (const entry of entries) {
    const before = places.get(entry.dataset.row), now = entry.getBoundingClientRect();
    if (!before) continue;
    const move = `translate(${before.left - now.left}px, ${before.top - now.top}px)`;
    entry.animate([{ transform: move }, { transform: "none" }], { duration: 350, easing: "ease-out" });
  }
}

function element(tag, name, parent) {
  const made = document.createElement(tag);
  made.className = name;
  parent.append(made);
  return made;
}

function makeEntry(hit) {
  const entry = document.createElement("li");
  entry.dataset.row = hit.row;
  if (about.indexed === "audio") {
    const sound = element("audio", "", entry);
    sound.controls = true;
    sound.preload = "none";
    sound.src = `/item/${hit.row}`;
    sound.setAttribute("aria-label", hit.name);
  }
  const button = element("button", "open", entry);
  button.type = "button";
  button.addEventListener("click", () => openDetail(entry.hit));
  if (about.indexed === "image") {
    const image = element("img", "", button);
    image.alt = "";
    image.src = `/item/${hit.row}`;
  }
  const facts = element("span", "facts", button);
  for (const name of ["rank", "moved", "score"]) element("span", name, facts);
  element("span", "name", button).textContent = hit.name;
  return entry;
}

function fill(entry, hit, rank, before) {
  const number = (value) => (value === null ? "none" : value.toFixed(3));
  entry.hit = hit;
  const moved = before === undefined ? "new" : before > rank ? `\u2191${before - rank}` : before < rank ? `\u2193${rank - before}` : "";
  entry.querySelector(".rank").textContent = rank;
  entry.querySelector(".moved").textContent = moved;
  entry.querySelector(".score").textContent = number(hit.score);
  const match = hit.match === null ? "" : `, match logit ${number(hit.match)}`;
  entry.querySelector(".score").title = `cosine ${number(hit.cosine)}${match}`;
  entry.querySelector(".open").setAttribute("aria-label", `${rank}: ${hit.name}, score ${number(hit.score)}: show attention`);
}

// Attention

let weights = null; // answer of /attention for the open result

async function openDetail(hit) {
  weights = null;
  $("detail-name").textContent = hit.name;
  $("detail-image").src = about.indexed === "image" ? `/item/${hit.row}` : query.url;
  $("detail-audio").src = about.indexed === "image" ? query.url : `/item/${hit.row}`;
  $("stage").classList.toggle("squash", about.resize === "squash");
  $("attention").hidden = true;
  $("detail-status").textContent = "Computing the attention ...";
  $("detail-status").classList.remove("error");
  paint(null);
  $("detail").showModal();
  const asked = query;
  try {
    const answer = await ask(`/attention?row=${hit.row}`, asked.body);
    if (asked !== query || !$("detail").open || $("detail-name").textContent !== hit.name) return;
    weights = answer;
    const timed = weights.frames.length > 0;
    for (const id of ["time", "time-label", "show-total"]) $(id).hidden = !timed;
    $("time").max = Math.max(0, weights.frames.length - 1);
    $("time").value = 0;
    $("attention").hidden = false;
    $("detail-status").textContent = "";
    choose(timed ? "show-total" : "show-match");
  } catch (error) {
    $("detail-status").textContent = `No attention: ${error.message}`;
    $("detail-status").classList.add("error");
  }
}

function choose(id) {
  for (const button of document.querySelectorAll(".choices button")) {
    button.setAttribute("aria-pressed", String(button.id === id));
  }
  const frame = Number($("time").value), step = weights.seconds / Math.max(1, weights.frames.length);
  $("time-value").textContent = `${(frame * step).toFixed(2)} to ${((frame + 1) * step).toFixed(2)} s`;
  paint({ "show-total": weights.total, "show-match": weights.match, time: weights.frames[frame] }[id] ?? null);
}

// Patches are darkened by how far their weight is below the highest.
function paint(values) {
  const canvas = $("heat"), side = weights?.side ?? 1;
  canvas.width = canvas.height = side;
  $("detail-figures").textContent = "";
  if (!values) return;
  const highest = Math.max(...values), pen = canvas.getContext("2d"), pixels = pen.createImageData(side, side);
  values.forEach((value, n) => (pixels.data[4 * n + 3] = Math.round(215 * (1 - value / highest))));
  pen.putImageData(pixels, 0, 0);
  const times = (highest * values.length).toFixed(1);
  $("detail-figures").textContent = `It is ${times} times the mean over ${values.length} patches.`;
}

// Events

function onKey(event) {
  const typing = event.target.closest("input, audio, dialog") || event.ctrlKey || event.metaKey || event.altKey;
  if (event.key === "Escape" && recording) stopRecording(false);
  if (typing || $("detail").open) return;
  if (event.key === "r" && about.indexed === "image") $("record").click();
  if (event.key === "o") $("upload").click();
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const buttons = [...document.querySelectorAll(".open")], here = buttons.indexOf(document.activeElement);
  if (step && buttons.length) {
    event.preventDefault();
    buttons[here < 0 ? 0 : Math.max(0, Math.min(buttons.length - 1, here + step))].focus();
  }
}

function listen() {
  $("record").addEventListener("click", () => (recording ? stopRecording() : startRecording()));
  $("upload").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    take($("file").files[0]);
    $("file").value = "";
  });
  let depth = 0; // dragenter and dragleave come for each element below the pointer
  const dragged = (by) => ($("drop").hidden = (depth = Math.max(0, depth + by)) === 0);
  addEventListener("dragenter", () => dragged(1));
  addEventListener("dragleave", () => dragged(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    dragged(-depth);
    take(event.dataTransfer.files[0]);
  });
  addEventListener("keydown", onKey);
  for (const id of ["show-total", "show-match", "show-none"]) $(id).addEventListener("click", () => choose(id));
  $("time").addEventListener("input", () => choose("time"));
  $("detail-audio").addEventListener("timeupdate", () => {
    if (!weights?.frames.length || $("detail-audio").paused) return;
    const frame = Math.floor(($("detail-audio").currentTime / weights.seconds) * weights.frames.length);
    $("time").value = Math.min(frame, weights.frames.length - 1);
    choose("time");
  });
  $("close").addEventListener("click", () => $("detail").close());
  $("detail").addEventListener("close", () => $("detail-audio").pause());
}

function keys(...pairs) {
  for (const [key, meaning] of pairs) {
    const shown = document.createElement("kbd");
    shown.textContent = key;
    $("keys").append(shown, ` ${meaning}   `);
  }
}

async function start() {
  try {
    about = await ask("/about");
  } catch (error) {
    say(error.message, true);
    return;
  }
  const spoken = about.indexed === "image", items = about.items.toLocaleString("en");
  $("title").textContent = spoken ? `Search ${items} images by voice` : `Search ${items} recordings by an image`;
  document.title = $("title").textContent;
  $("hint").textContent = spoken ? "or drop a recording anywhere" : "or drop a picture anywhere";
  $("record").hidden = !spoken;
  $("upload").classList.toggle("primary", !spoken);
  $("file").accept = spoken ? "audio/*" : "image/jpeg,image/png,image/webp";
  $("results").classList.toggle("sounds", !spoken);
  if (spoken) keys(["r", "record, stop"]);
  keys(["o", "choose a file"], ["arrows", "results"], ["Enter", "attention"], ["Esc", "close, discard"]);
  listen();
}

start();
