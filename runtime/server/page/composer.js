/**
 * Where a question is written: Enter sends it, Shift+Enter starts a new line, Escape stops, on the whole page.
 */

import { announce } from "./announcer.js";

const form = document.getElementById("composer");
const question = document.getElementById("question");
const send = document.getElementById("send");
const stop = document.getElementById("stop");

let isReady = false;
let isRunning = false;

/**
 * @param {object} handlers
 * @param {(question: string) => void} handlers.onAsk
 * @param {() => void} handlers.onStop
 * @param {() => void} handlers.onNewChat
 */
export function startComposer({ onAsk, onStop, onNewChat }) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = question.value.trim();
    if (!isReady || !text) return;
    if (isRunning) {
      announce("Wait for the answers, or press Escape to stop them.");
      return;
    }
    question.value = "";
    fitHeight();
    onAsk(text);
  });
  question.addEventListener("keydown", (event) => {
    // While a character is composed, Enter chooses it.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  question.addEventListener("input", () => {
    fitHeight();
    update();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && isRunning && !event.isComposing) onStop();
  });
  stop.addEventListener("click", onStop);
  document.getElementById("new-chat").addEventListener("click", () => {
    onNewChat();
    question.focus();
  });
}

/** Say whether questions can be sent at all. */
export function setReady(ready) {
  isReady = ready;
  update();
}

/** Say whether answers are being waited for. */
export function setRunning(running) {
  const button = running ? send : stop;
  const hadFocus = document.activeElement === button;
  isRunning = running;
  update();
  // The focus of a button that goes would be lost.
  if (hadFocus) question.focus();
}

function update() {
  send.hidden = isRunning;
  stop.hidden = !isRunning;
  send.disabled = !isReady || !question.value.trim();
}

function fitHeight() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + question.offsetHeight - question.clientHeight}px`;
}
