/* The conversation of the chat page, and its calls of the API. */
const $ = id => document.getElementById(id);
let model = "", turns = [];
let running = null; // the AbortController of the answer that arrives
let isQueued = false; // Enter was pressed meanwhile: the text in the field is sent after the answer

// Calls of the API

/* The key stays in this tab: sessionStorage ends with it. */
function headers() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/* Returns the response, and asks for the key if it is needed. */
async function call(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { ...options.headers, ...headers() } });
  $("login").hidden = response.status !== 401;
  return response;
}

async function updateState() {
  try {
    const response = await fetch("/health");
    const body = await response.json();
    $("state").textContent = response.ok ? "ready" : body.detail ?? body.phase;
    if (response.ok && !model) {
      const models = await call("/v1/models");
      if (models.ok) $("model").textContent = model = (await models.json()).data[0].id;
    }
  } catch { $("state").textContent = "no response"; }
}

/* Server-sent events of a POST, which EventSource does not support: yields the JSON object of each `data:` line. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines)
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

/* Fills `answer` with the answer to `messages`. Throws what went wrong. */
async function complete(messages, answer, signal) {
  const number = id => $(id).value === "" ? undefined : Number($(id).value); // JSON leaves undefined fields out
  const response = await call("/v1/chat/completions", {
    method: "POST", signal, headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model, messages, stream: true, temperature: number("temperature"),
                           max_tokens: number("max_tokens") }),
  });
  if (!response.ok) {
    const { error, message } = await response.json().catch(() => ({})); // a proxy may answer in HTML
    throw new Error(error?.message ?? message ?? `status ${response.status}`);
  }
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.choices[0]) answer.add(event.choices[0]);
  }
  if (!answer.finish) throw new Error("the connection ended before the answer did");
}

// The conversation

/* Appends to the conversation, or changes it, and keeps its end in view unless the reader has scrolled up. */
function scrolled(change) {
  const page = document.documentElement, follows = page.scrollHeight - page.scrollTop - page.clientHeight < 60;
  change();
  if (follows) page.scrollTop = page.scrollHeight;
}

/* One answer, shown as it arrives. */
class Answer {
  content = ""; reasoning = ""; finish = ""; calls = [];
  box = element("div", "message assistant"); body = element("div", "content");
  #frame = 0;

  constructor() { this.box.append(this.body); }

  add({ delta, finish_reason }) {
    this.content += delta.content ?? "";
    this.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
    for (const { index, function: piece } of delta.tool_calls ?? []) {
      const call = this.calls[index] ??= { name: "", arguments: "" };
      call.name += piece.name ?? "";
      call.arguments += piece.arguments ?? "";
    }
    this.finish = finish_reason ?? this.finish;
    this.#frame ||= requestAnimationFrame(() => this.show()); // however fast the tokens come
  }

  show() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    scrolled(() => {
      if (this.reasoning) this.#folded().textContent = this.reasoning;
      showMarkdown(this.body, this.content);
      this.box.querySelectorAll(".call").forEach(shown => shown.remove());
      this.body.after(...this.#callTexts().map(text => element("pre", "call", text)));
    });
  }

  note(text) { scrolled(() => this.box.append(element("p", "note", text))); }

  /* What later requests send as this turn. The page has no tools, so a call is only a text. */
  turn() { return { role: "assistant", content: this.content || this.#callTexts().join("\n") }; }

  #callTexts() { return this.calls.filter(Boolean).map(call => `${call.name}(${call.arguments})`); }

  #folded() {
    if (!this.box.querySelector("details")) {
      const details = element("details");
      details.append(element("summary", "", "Reasoning"), element("div", "reasoning"));
      this.box.prepend(details);
    }
    return this.box.querySelector(".reasoning");
  }
}

/* Asks one question. Only a question that was answered becomes part of the conversation: whatever made a request fail
   would make all later ones fail too. */
async function ask(text) {
  const question = element("div", "message user", text), answer = new Answer(), controller = new AbortController();
  const turn = { role: "user", content: text };
  $("conversation").append(question, answer.box);
  question.scrollIntoView();
  setRunning(controller);
  let failure = null;
  await complete([...turns, turn], answer, controller.signal).catch(error => { failure = error; });
  if (running !== controller) return; // a new chat has begun
  setRunning(null);
  answer.show();
  if (answer.turn().content) turns.push(turn, answer.turn());
  else {
    question.classList.add("failed");
    $("text").value ||= text;
  }
  if (failure?.name === "AbortError") answer.note("stopped");
  else if (failure) {
    answer.box.classList.add("failed");
    answer.note(failure.message + (answer.content ? "" : " (the conversation goes on without this question)"));
  } else if (answer.finish === "length") answer.note("cut off: max_tokens, or the longest text that fits, is reached");
  const isNext = isQueued && (!failure || failure.name === "AbortError");
  setQueued(false);
  if (isNext) $("ask").requestSubmit();
}

function setRunning(controller) {
  running = controller;
  $("stop").hidden = !running;
  $("send").hidden = !!running;
}

function setQueued(value) {
  isQueued = value;
  $("notice").textContent = value ? "sent after this answer, or when you stop it" : "";
}

// Events

$("ask").addEventListener("submit", event => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) return;
  if (running) return setQueued(true);
  $("text").value = "";
  ask(text);
});
$("text").addEventListener("keydown", event => {
  // While an input method composes, Enter chooses a candidate (229: Safari tells only this way).
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("text").addEventListener("input", () => setQueued(false));
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  running?.abort();
  setRunning(null);
  setQueued(false);
  turns = [];
  $("conversation").replaceChildren();
  $("text").focus();
});
$("login").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value.trim());
  updateState();
});
/* A link sends no key, so with one the page fetches what it points to. */
document.querySelector("nav").addEventListener("click", async event => {
  if (!event.target.href || !sessionStorage.getItem("key")) return;
  event.preventDefault();
  const response = await call(event.target.getAttribute("href"));
  location.href = URL.createObjectURL(await response.blob());
});
updateState();
setInterval(updateState, 3000);
