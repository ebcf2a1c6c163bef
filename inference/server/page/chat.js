// The chat page. It sends requests to this server's /v1, stores the chat in the browser, and loads nothing from other
// hosts.
"use strict";

const COLOURS = ["#3467b0", "#c8553d", "#588157", "#b08d2e", "#7d5ba6", "#2a9d8f", "#d1698c", "#6c757d"];
const SHOWN = 7; // candidates in a bar, the others share one part
const STORE = "expertoken-chat";
const $ = (id) => document.getElementById(id);

const RENDERED = 400; // milliseconds between two renderings of a streaming answer
const KEPT = 1000; // milliseconds between two saves of a streaming answer

const state = { turns: [], models: [], controller: null, editing: null };

// --- storage across reloads -------------------------------------------------------------------------------------

function store() {
  return `${STORE}-${state.name}`; // one entry for each composite at this address
}

function save() {
  const turns = state.turns.map(({ html, ...turn }) => turn);
  for (const kept of [turns, turns.map(({ pictures, ...turn }) => turn)]) {
    try {
      sessionStorage.setItem(store(), JSON.stringify(kept)); // each tab has its own chat, a new tab gets the newest
      localStorage.setItem(store(), JSON.stringify(kept));
      return;
    } catch {
      // The storage has no room for pictures, or (in a private window) for anything. The chat continues without it.
    }
  }
}

function restore() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(store()) ?? localStorage.getItem(store())) ?? [];
    state.turns = kept.every((turn) => typeof turn.content === "string" && typeof turn.role === "string") ? kept : [];
    $("machinery").checked = localStorage.getItem(`${STORE}-plain`) !== "true";
    $("system").value = localStorage.getItem(`${store()}-system`) ?? "";
  } catch {
    state.turns = [];
  }
}

// --- requests to the server -------------------------------------------------------------------------------------

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("expertoken-key");
  if (/[^!-~]/.test(key ?? "")) { // a header can't hold such a key
    await login(true);
    return ask(path, options);
  }
  const headers = { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("the server can't be reached");
  });
  if (response.status === 401) {
    await login(Boolean(key));
    return ask(path, options);
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Error(body.error?.message ?? `the server answered ${response.status}`);
  }
  return response;
}

function login(refused) {
  $("key").value = "";
  $("refused").hidden = !refused;
  $("login").showModal();
  return new Promise((resolve, reject) => {
    $("login").oncancel = () => reject(new Error("this server requires an API key. Reload the page to enter one."));
    $("login").onclose = () => {
      sessionStorage.setItem("expertoken-key", $("key").value.trim());
      resolve();
    };
  });
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error("the connection was cut off");
    });
    if (done) throw new Error("the connection was cut off");
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue; // a comment, which keeps the connection open
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Answers are Markdown. The server renders it as HTML and escapes HTML in the answer.
async function render(article, turn) {
  const { content, told } = turn;
  const seam = told?.handed_over?.after_characters;
  const characters = seam ? [...content] : []; // the server counts characters, JavaScript counts UTF-16 units
  const texts = seam ? [characters.slice(0, seam).join(""), characters.slice(seam).join("")] : [content];
  try {
    const { html } = await (await ask("render", { method: "POST", body: JSON.stringify({ texts }) })).json();
    if ((turn.html?.length ?? 0) > content.length && turn.content.startsWith(content)) return; // a later one exists
    turn.html = { parts: html, length: content.length };
    draw(article, turn);
  } catch {
    // The answer stays plain text.
  }
}

// --- display ----------------------------------------------------------------------------------------------------

function colour(name) {
  const place = state.models.indexOf(name);
  return COLOURS[(place < 0 ? 0 : place) % COLOURS.length];
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
}

function parts(probabilities) {
  const sorted = Object.entries(probabilities).sort((a, b) => b[1] - a[1]);
  const shown = sorted.slice(0, SHOWN);
  const others = sorted.slice(SHOWN).reduce((sum, [, share]) => sum + share, 0);
  return others > 0 ? [...shown, [`${sorted.length - SHOWN} others`, others]] : shown;
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function draw(article, turn) {
  article.className = turn.role;
  article.classList.toggle("waiting", Boolean(turn.waiting));
  drawText(article.querySelector(".text"), turn);
  if (turn.pictures && !article.querySelector(".pictures").children.length) {
    article.querySelector(".pictures").append(...shown(turn.pictures));
  }
  const thought = article.querySelector(".thought");
  thought.hidden = !turn.thought;
  thought.querySelector("div").textContent = turn.thought ?? "";
  if (turn.waiting) thought.open = !turn.content; // open until the answer begins
  article.querySelector(".edit").hidden = turn.role !== "user";
  const mark = article.querySelector(".mark");
  mark.hidden = !turn.error;
  mark.textContent = turn.error ?? "";
  const why = article.querySelector(".why");
  why.hidden = !turn.told;
  // Only the last answer can be replaced, since later messages refer to the earlier ones.
  article.querySelector(".again").hidden = turn.role !== "assistant" || Boolean(turn.waiting) || turn !== state.turns.at(-1);
  if (!turn.told) return;
  const { expert, probabilities, reason, failures, cost, seconds, decided_seconds: decided, handed_over: handed } =
    turn.told;
  const all = parts(probabilities);
  article.querySelector(".who").textContent = expert;
  const bar = article.querySelector(".bar");
  bar.setAttribute("aria-label", all.map(([name, share]) => `${name} ${percent(share)}`).join(", "));
  bar.replaceChildren(...all.map(([name, share]) =>
    element("i", { style: `width:${100 * share}%;background:${colour(name)}`, title: `${name} ${percent(share)}` })));
  const price = cost === null ? "" : ` · ${dollars(cost)}`;
  article.querySelector(".numbers").textContent = seconds ? `${(decided + seconds).toFixed(1)} s${price}` : "";
  const failed = Object.entries(failures).map(([name, why]) => `${name} failed: ${why}`);
  const over = handed ? [`self handed over to ${handed.expert} after ${handed.after_characters} characters ` +
    `(${percent(handed.probabilities[handed.expert])})`] : [];
  article.querySelector(".reason").textContent = [reason, ...over, ...failed].join(". ");
  article.querySelector(".shares").replaceChildren(...all.map(([name, share]) =>
    element("li", {}, element("span", { textContent: name }),
      element("span", { className: "part", style: `width:${100 * share}%;background:${colour(name)}` }),
      element("span", { textContent: percent(share) }))));
}

function drawText(place, turn) {
  if (turn.role !== "assistant" || !turn.html) {
    place.textContent = turn.content;
    return;
  }
  const seam = element("p", { className: "seam", textContent: `${turn.told?.expert} continues` });
  place.replaceChildren(...turn.html.parts.flatMap((html, part) =>
    [...(part ? [seam] : []), element("div", { innerHTML: html })]), turn.content.slice(turn.html.length));
  for (const link of place.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  for (const code of place.querySelectorAll("pre")) {
    const copy = element("button", { type: "button", className: "copy", textContent: "Copy" });
    copy.onclick = async () => {
      await navigator.clipboard.writeText(code.querySelector("code").textContent);
      copy.textContent = "Copied";
    };
    code.append(copy);
  }
}

function dollars(cost) {
  if (cost < 1e-6) return "under $0.000001";
  return `$${cost < 0.01 ? cost.toPrecision(2) : cost.toFixed(2)}`;
}

function add(turn, index) {
  const article = $("turn").content.firstElementChild.cloneNode(true);
  const select = article.querySelector("select");
  select.append(element("option", { value: "", textContent: "the composite" }),
    ...state.models.map((name) => element("option", { value: name, textContent: name })));
  article.querySelector(".again button").onclick = () => retry(index, select.value);
  article.querySelector(".edit").onclick = () => edit(index);
  $("chat").append(article);
  draw(article, turn);
  return article;
}

function drawAll() {
  for (const article of document.querySelectorAll("article")) article.remove();
  state.turns.forEach(add);
  drawHead();
}

function drawHead() {
  $("empty").hidden = state.turns.length > 0;
  document.body.classList.toggle("plain", !$("machinery").checked);
  const cost = state.turns.reduce((sum, turn) => sum + (turn.told?.cost ?? 0) + (turn.spent ?? 0), 0);
  $("cost").textContent = cost ? `${dollars(cost)} so far` : "";
}

// --- actions ----------------------------------------------------------------------------------------------------

async function answer(expert = "", spent = 0, before = null) {
  const index = state.turns.length;
  const turn = { role: "assistant", content: "", waiting: true, spent };
  // Each answer is sent with its expert's name, since a policy may keep a chat with its expert.
  // A message without an answer is omitted, since some models refuse two user messages in a row.
  const answered = state.turns.filter((t, place) => t.content && (t.role === "assistant" ||
    place === state.turns.length - 1 || state.turns[place + 1]?.content));
  const system = $("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...answered.map((t) =>
    ({ role: t.role, content: asked(t), ...(t.role === "assistant" && t.told ? { name: t.told.expert } : {}) }))];
  state.turns.push(turn);
  const article = add(turn, index);
  drawHead();
  scroll();
  state.controller = new AbortController();
  busy(true);
  try {
    const body = { model: expert ? `${state.name}/${expert}` : state.name, messages, stream: true,
      expertoken: { show: true } };
    const options = { method: "POST", body: JSON.stringify(body), signal: state.controller.signal };
    let rendered = Date.now();
    let kept = Date.now();
    for await (const event of events(await ask("v1/chat/completions", options))) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta ?? {};
      turn.content += delta.content ?? "";
      const thought = delta.reasoning_content ?? delta.reasoning;
      if (thought) turn.thought = (turn.thought ?? "") + thought;
      turn.told = event.expertoken ?? turn.told;
      if (Date.now() - rendered > RENDERED) {
        rendered = Date.now();
        render(article, turn);
      }
      if (Date.now() - kept > KEPT) {
        kept = Date.now();
        save();
      }
      draw(article, turn);
      scroll();
    }
  } catch (error) {
    turn.error = error.name === "AbortError" ? "stopped" : error.message;
  }
  turn.waiting = false;
  if (before && !turn.content) { // asking again failed, so the earlier answer stays
    Object.assign(turn, before, { error: `asking again failed: ${turn.error ?? "an empty answer"}`,
      spent: before.spent ?? 0 });
  }
  if (turn.content) await render(article, turn);
  $("said").textContent = turn.error ?? `${turn.told?.expert ?? "the composite"} answered`;
  busy(false);
  draw(article, turn);
  scroll();
  drawHead();
  save();
}

function edit(index) {
  if (!$("stop").hidden) return;
  state.editing = index;
  $("text").value = state.turns[index].content;
  wait(state.turns[index].pictures);
  $("editing").hidden = false;
  grow();
  $("text").focus();
}

function leaveEditing() {
  state.editing = null;
  $("editing").hidden = true;
}

function retry(index, expert) {
  if (state.controller?.signal && !$("stop").hidden) return;
  // Discarded answers count towards the cost too.
  const before = state.turns[index];
  state.turns.length = index;
  drawAll();
  answer(expert, (before.told?.cost ?? 0) + (before.spent ?? 0), before.content ? before : null);
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
}

function scroll() {
  const chat = $("chat");
  if (chat.scrollHeight - chat.scrollTop - chat.clientHeight < 200) chat.scrollTop = chat.scrollHeight;
}

async function send() {
  const content = $("text").value.trim();
  if (!content || !$("stop").hidden || $("send").disabled) return;
  $("text").value = "";
  grow();
  await pictures.coming;
  await ready; // if the page has not started yet, the stored chat comes before this message
  if ($("send").disabled || !$("stop").hidden) { // the page could not start, or another message was sent meanwhile
    $("text").value = [content, $("text").value].filter(Boolean).join("\n");
    grow();
    return;
  }
  if (state.editing !== null) { // later messages refer to the message before the edit
    state.turns.length = state.editing;
    leaveEditing();
    drawAll();
  }
  state.turns.push({ role: "user", content, ...(pictures.waiting.length ? { pictures: pictures.waiting } : {}) });
  wait([]);
  for (const again of document.querySelectorAll(".again")) again.hidden = true;
  add(state.turns.at(-1), state.turns.length - 1);
  $("chat").scrollTop = $("chat").scrollHeight;
  save();
  answer();
}

function grow() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
}

$("ask").onsubmit = (event) => { event.preventDefault(); send(); };
$("text").oninput = grow;
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
  if (event.key === "Escape" && state.editing !== null) {
    $("text").value = "";
    wait([]);
    leaveEditing();
  }
};
$("system").onchange = () => localStorage.setItem(`${store()}-system`, $("system").value);
$("stop").onclick = () => state.controller.abort();
$("reset").onclick = async () => {
  await ready;
  state.controller?.abort();
  state.turns = [];
  leaveEditing();
  save();
  drawAll();
};
$("machinery").onchange = () => {
  localStorage.setItem(`${STORE}-plain`, String(!$("machinery").checked));
  drawHead();
};

async function start() {
  try {
    const { data } = await (await ask("v1/models")).json();
    state.name = data[0].id;
    state.models = data.slice(1).map((model) => model.id.slice(state.name.length + 1));
    $("name").textContent = state.name;
    document.title = state.name;
  } catch (error) {
    $("empty").textContent = error.message;
    $("send").disabled = true;
    return;
  }
  restore();
  for (const turn of state.turns) {
    if (turn.waiting) Object.assign(turn, { waiting: false, error: "interrupted" }); // the page was closed or reloaded
  }
  if (state.turns.at(-1)?.role === "user") { // the page was closed or reloaded before the answer
    state.turns.push({ role: "assistant", content: "", error: "interrupted" });
  }
  drawAll();
  $("chat").scrollTop = $("chat").scrollHeight;
  const articles = document.querySelectorAll("article");
  state.turns.forEach((turn, place) => turn.role === "assistant" && turn.content && render(articles[place], turn));
}

const ready = start();
