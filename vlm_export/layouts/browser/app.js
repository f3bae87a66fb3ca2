/** What people see and press: it asks the worker, and shows what it answers. */

const SHOWN_FIRST = 200;
const PAUSE_MS = 250;

const worker = new Worker("./worker.js", { type: "module" });
const waiting = new Map();
const at = (id) => document.getElementById(id);
let lastId = 0;
let shownKey = null;
let newest = 0;
let pause;

/** The worker's answer to one call; an Error with what it says went wrong. */
export function ask(method, ...args) {
  return new Promise((resolve, reject) => {
    waiting.set(++lastId, { resolve, reject });
    worker.postMessage({ id: lastId, method, args });
  });
}

worker.onmessage = ({ data }) => {
  if (data.progress) return showProgress(data.progress);
  const { resolve, reject } = waiting.get(data.id);
  waiting.delete(data.id);
  if (data.error === undefined) resolve(data.result);
  else reject(new Error(data.error));
};
worker.onerror = () => fail("This browser cannot run the page: it needs module workers (2023 or newer).");

function showProgress({ step, done, total }) {
  const mib = (bytes) => Math.round(bytes / (1 << 20));
  const amount = total ? ` · ${mib(done)} of ${Math.max(1, mib(total))} MiB` : "";
  setStatus("busy", step[0].toUpperCase() + step.slice(1) + amount, total ? done / total : null);
}

/** `share` of the work that is done, null where it is not known, nothing where no work is going on. */
function setStatus(state, text, share) {
  document.body.dataset.state = state;
  at("status-text").textContent = text;
  const bar = at("progress");
  bar.hidden = share === undefined;
  if (share === null) bar.removeAttribute("value");
  else if (share !== undefined) bar.value = share;
}

function fail(text) {
  setStatus("failed", "Not available");
  complain(text);
}

function complain(text) {
  const item = document.createElement("li");
  const close = document.createElement("button");
  item.append(text, close);
  close.textContent = "✕";
  close.className = "quiet";
  close.setAttribute("aria-label", "Dismiss");
  close.onclick = () => item.remove();
  at("messages").append(item);
}

async function start() {
  try {
    // `?engine=wasm` or `?engine=webgpu` instead of the choice of the page.
    const { name, engine, score } = await ask("open", new URLSearchParams(location.search).get("engine"));
    at("about").textContent = `${name} · ${engine}`;
    at("labels").hidden = score === null;
    setStatus("ready", "Ready");
  } catch (error) {
    return fail(error.message);
  }
  for (const element of document.querySelectorAll("#search :disabled, #files")) element.disabled = false;
  await search();
}

async function add(files) {
  if (document.body.dataset.state !== "ready" || files.length === 0) return;
  at("messages").replaceChildren();
  at("query").value = "";
  let done = 0;
  for (const file of files) {
    setStatus("busy", `Reading image ${done + 1} of ${files.length}`, done / files.length);
    try {
      const entry = await ask("add", file);
      at("results").querySelector(`[data-key="${CSS.escape(entry.key)}"]`)?.remove();
      at("results").prepend(card(entry));
      count();
    } catch (error) {
      complain(`${file.name}: ${error.message}.`);
    }
    done++;
  }
  setStatus("ready", "Ready");
  await search();
}

async function search() {
  const number = ++newest;
  const text = at("query").value.trim();
  try {
    const found = await ask("search", text);
    if (number !== newest) return;
    forgetPictures(at("results"));
    at("results").replaceChildren(...found.slice(0, SHOWN_FIRST).map(card));
    at("results").dataset.query = text;
    at("messages").replaceChildren(...[...at("messages").children].filter((item) => !item.dataset.search));
    count(found.length);
  } catch (error) {
    complain(error.message);
    at("messages").lastChild.dataset.search = true;
  }
}

function count(total = at("results").children.length) {
  const shown = Math.min(total, SHOWN_FIRST);
  at("count").textContent = `${total} image${total === 1 ? "" : "s"}${shown < total ? `, the first ${shown} shown` : ""}`;
  at("summary").hidden = total === 0;
  document.body.classList.toggle("filled", total > 0);
}

function card({ key, name, thumbnail, cosine }) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const image = document.createElement("img");
  const caption = document.createElement("span");
  item.dataset.key = key;
  button.type = "button";
  image.src = URL.createObjectURL(thumbnail);
  image.alt = "";
  caption.className = "name";
  caption.textContent = name;
  button.append(image, caption);
  if (cosine !== null) {
    const value = document.createElement("span");
    value.className = "cosine";
    value.textContent = cosine.toFixed(3).replace("-", "\u2212");
    value.title = "Cosine of the image and the text";
    button.append(value);
  }
  button.onclick = () => showDetails(key, name, thumbnail);
  item.append(button);
  return item;
}

function forgetPictures(element) {
  for (const image of element.querySelectorAll("img")) URL.revokeObjectURL(image.src);
}

function showDetails(key, name, thumbnail) {
  shownKey = key;
  URL.revokeObjectURL(at("details-image").src);
  at("details-image").src = URL.createObjectURL(thumbnail);
  at("details-image").alt = name;
  at("details-name").textContent = name;
  at("probabilities").replaceChildren();
  at("labels-error").textContent = "";
  at("label-list").value = localStorage.getItem("labels") ?? "dog\ncat\nperson\nlandscape";
  at("template").value = localStorage.getItem("template") ?? "a photo of a {}";
  at("details").showModal();
}

async function classify(event) {
  event.preventDefault();
  const labels = [...new Set(at("label-list").value.split("\n").map((label) => label.trim()))].filter(Boolean);
  const template = at("template").value.trim() || "{}";
  at("labels-error").textContent = "";
  if (labels.length === 0) return void (at("labels-error").textContent = "Write at least one label.");
  if (!template.includes("{}")) return void (at("labels-error").textContent = "The sentence needs {} for the label.");
  localStorage.setItem("labels", at("label-list").value);
  localStorage.setItem("template", template);
  try {
    const rows = await ask("classify", shownKey, labels, template);
    at("probabilities").replaceChildren(...rows.map(probabilityRow));
  } catch (error) {
    at("labels-error").textContent = error.message;
  }
}

function probabilityRow({ label, probability }) {
  const row = document.createElement("li");
  const name = document.createElement("span");
  const value = document.createElement("span");
  const bar = document.createElement("meter");
  name.textContent = label;
  value.textContent = `${(100 * probability).toFixed(1)} %`;
  value.dataset.probability = probability;
  bar.value = probability;
  bar.setAttribute("aria-label", label);
  row.append(name, value, bar);
  return row;
}

at("search").onsubmit = (event) => {
  event.preventDefault();
  clearTimeout(pause);
  search();
};
at("query").oninput = () => {
  clearTimeout(pause);
  pause = setTimeout(search, PAUSE_MS);
};
at("files").onchange = async () => {
  const files = [...at("files").files];
  at("files").value = "";
  await add(files);
};
at("labels").onsubmit = classify;
at("close").onclick = () => at("details").close();
at("details").onclick = (event) => event.target === at("details") && at("details").close();
at("remove").onclick = async () => {
  await ask("remove", shownKey);
  at("details").close();
  await search();
};
at("clear").onclick = async () => {
  if (!confirm("Remove all images from this page's index?")) return;
  await ask("clear");
  await search();
};

let depth = 0;
addEventListener("dragenter", (event) => {
  event.preventDefault();
  document.body.classList.toggle("dragging", ++depth > 0);
});
addEventListener("dragleave", () => document.body.classList.toggle("dragging", --depth > 0));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("dragging");
  add([...event.dataTransfer.files]);
});

start();
