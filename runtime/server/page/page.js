/**
 * The page: asks what the server runs, shows it, and brings composer, conversation and the server's state together.
 */

import { startComposer, setReady, setRunning } from "./composer.js";
import { Conversation } from "./conversation.js";
import { element } from "./elements.js";
import { keepKey, readKey } from "./key.js";
import { ServerError, checkReady, describeBundle } from "./server.js";
import { sharersInUse, showSharers } from "./sharers.js";
import { Side } from "./side.js";

const CHECK_EVERY = 10_000;
/** Errors that say how the server is; the others are one answer's own. */
const STATES = ["key", "busy", "draining", "broken", "unreachable"];
const WIDE = matchMedia("(min-width: 64rem)");
const byId = (id) => document.getElementById(id);

let conversation = null;

startComposer({
  onAsk: (question) => conversation.ask(question),
  onStop: () => conversation.stop(),
  onNewChat: () => {
    conversation?.clear();
    byId("empty").hidden = false;
  },
});
byId("key-form").addEventListener("submit", useKey);
byId("forget-key").addEventListener("click", forgetKey);
WIDE.addEventListener("change", fitPanel);
setInterval(watch, CHECK_EVERY);
fitPanel();
await load();

/** Ask what is served, and show it. Until that works, nothing can be asked. */
async function load() {
  try {
    const bundle = await describeBundle();
    showBundle(bundle);
    if (conversation === null) begin(bundle);
    showState("ready", "Ready");
    setReady(true);
    byId("forget").hidden = !readKey();
  } catch (error) {
    showError(error);
  }
}

function begin(bundle) {
  const longest = () => ({
    max_tokens: Math.min(Math.max(1, Math.floor(byId("longest").valueAsNumber) || 1), bundle.max_tokens),
  });
  const c2c = () => {
    const sharers = sharersInUse();
    const names = sharers.map((number) => bundle.sharers[number].name).join(" and ");
    return { detail: names ? `with ${names}` : "with no sharer", fields: { ...longest(), sharers } };
  };
  const alone = () => ({ detail: bundle.receiver.name, fields: longest() });
  const isAlone = bundle.models.receiver === null;
  const sides = isAlone
    ? [new Side("receiver", "The model", bundle.models.c2c, alone)]
    : [
        new Side("receiver", "Receiver alone", bundle.models.receiver, alone),
        new Side("c2c", "C2C", bundle.models.c2c, c2c),
      ];
  if (isAlone) showLackOfSharers();
  conversation = new Conversation(byId("conversation"), sides);
  conversation.onRunning = (isRunning) => {
    if (isRunning) byId("empty").hidden = true;
    setRunning(isRunning);
  };
  conversation.onOutcome = (error) => {
    if (error === null) showState("ready", "Ready");
    else if (STATES.includes(error.kind)) showError(error);
  };
}

/** A bundle of one model has nothing to compare with. */
function showLackOfSharers() {
  byId("empty-title").textContent = "One model";
  byId("empty-text").textContent = "This bundle holds no sharers, so each question has one answer. Decoding is greedy.";
  byId("question-label").textContent = byId("question").placeholder = "Question";
  byId("together").hidden = true;
}

function showBundle(bundle) {
  byId("panel").hidden = false;
  document.title = `${bundle.bundle} · c2c-export`;
  byId("bundle").textContent = bundle.bundle;
  byId("models").textContent = bundle.sharers.length
    ? `${bundle.receiver.name} receives from ${bundle.sharers.map((sharer) => sharer.name).join(" and ")}`
    : bundle.receiver.name;
  const facts = {
    Engine: `${bundle.engine}, ${bundle.precision}`,
    Capacity: `${bundle.capacity} tokens, prompt and answer together`,
    Slots: `${bundle.num_slots}, so many answers at once`,
  };
  const entries = Object.entries(facts).map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value)),
  );
  byId("server").replaceChildren(...entries);
  byId("longest").max = bundle.max_tokens;
  // Half of it leaves room for what is asked.
  if (conversation === null) byId("longest").value = Math.max(1, Math.min(256, Math.floor(bundle.max_tokens / 2)));
  if (!byId("sharers").childElementCount) showSharers(bundle, () => {});
}

/** Look whether the server takes questions, while someone looks at the page and nothing else tells. */
async function watch() {
  if (document.hidden || conversation?.isRunning || byId("state").dataset.state === "key") return;
  if (conversation === null) {
    await load();
    return;
  }
  try {
    await checkReady();
    showState("ready", "Ready");
  } catch (error) {
    showError(error);
  }
}

function showError(error) {
  // What is no error of the server is a bug of the page, for its console.
  if (!(error instanceof ServerError)) throw error;
  showState(error.kind, error.message);
  if (error.kind === "key") askForKey();
}

/** The state as a sentence, told once. */
function showState(state, sentence) {
  const shown = byId("state");
  shown.dataset.state = state;
  if (shown.textContent !== sentence) shown.textContent = sentence;
}

function askForKey() {
  const isNew = byId("key-form").hidden;
  byId("key-form").hidden = false;
  byId("key").value = "";
  if (isNew) byId("key").focus();
}

async function useKey(event) {
  event.preventDefault();
  keepKey(byId("key").value.trim());
  byId("key-form").hidden = true;
  byId("question").focus();
  await load();
  if (byId("state").dataset.state === "ready") await conversation.askAgain("key");
}

function forgetKey() {
  keepKey("");
  byId("forget").hidden = true;
  byId("question").focus();
}

/** Beside the conversation the panel is always open; above it, it opens on demand. */
function fitPanel() {
  byId("panel").open = WIDE.matches;
}
