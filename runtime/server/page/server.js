/**
 * What the page asks of the server that it came from, and every way in which that can fail, as a sentence.
 *
 * Paths are relative to the page, so that it also works below a path of a reverse proxy.
 */

import { readKey } from "./key.js";
import { readEvents } from "./events.js";

/**
 * A request that failed. `message` is a sentence for the user; `kind` is one of
 *   key          the server asks for an API key, or knows this one not
 *   busy         its queue is full: try again after `retryAfter` seconds
 *   draining     it is shutting down
 *   broken       its engine failed: it takes no questions until it is started anew
 *   unreachable  nothing answered
 *   full         the prompt, and the answer asked for, exceed what the models hold
 *   refused      the request was wrong, or took too long
 *   failed       the server failed, or the connection broke
 */
export class ServerError extends Error {
  constructor(kind, message, retryAfter = null) {
    super(message);
    this.kind = kind;
    this.retryAfter = retryAfter;
  }
}

/** @returns {Promise<object>} GET /v1/c2c: bundle, engine, capacity, receiver, sharers with gates, model names. */
export async function describeBundle() {
  return (await ask("v1/c2c")).json();
}

/** Resolves if the server takes questions; rejects with a `ServerError` that says why not. */
export async function checkReady() {
  await ask("ready");
}

/**
 * One streamed chat completion. Aborting `signal` closes the connection, by which the server frees the slot.
 *
 * @param {object} body the request but for its streaming options
 * @param {AbortSignal} signal
 * @yields {{text: string}} pieces of the answer
 * @returns {AsyncGenerator<object, object>} at the end {finishReason, usage, timings, reusedTokens}, timings in seconds
 * @throws {ServerError}, or an AbortError when aborted
 */
export async function* streamChat(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const end = { finishReason: null, usage: null, timings: null, reusedTokens: 0 };
  try {
    for await (const data of readEvents(response.body)) {
      if (data === "[DONE]") return end;
      const chunk = JSON.parse(data);
      if (chunk.error) throw streamedError(chunk.error);
      const choice = chunk.choices[0];
      if (choice?.delta.content) yield { text: choice.delta.content };
      if (choice?.finish_reason) end.finishReason = choice.finish_reason;
      if (chunk.usage) end.usage = chunk.usage;
      if (chunk.c2c) {
        end.timings = chunk.c2c.timings;
        end.reusedTokens = chunk.c2c.reused_tokens;
      }
    }
  } catch (error) {
    // A connection that breaks is a TypeError to the browser.
    if (!(error instanceof TypeError)) throw error;
  }
  throw new ServerError("failed", "The connection broke before the answer was complete.");
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (readKey()) headers.Authorization = `Bearer ${readKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("unreachable", "The server cannot be reached. Is it running?");
  }
  if (response.ok) return response;
  throw await readError(response);
}

async function readError(response) {
  const { message: said, code } = await saidBy(response);
  if (code === "context_length_exceeded") {
    return new ServerError("full", "The conversation is longer than the models can hold. Start a new chat.");
  }
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  switch (response.status) {
    case 401:
      return new ServerError(
        "key",
        readKey() ? "The server does not know this API key. Enter another one." : "The server asks for an API key.",
      );
    case 429:
      return new ServerError("busy", "The server is busy: more requests wait than its queue holds.", retryAfter ?? 1);
    case 503:
      if (code === "engine_failed") return new ServerError("broken", "The server's engine failed. It answers again once it is started anew.", retryAfter);
      return new ServerError("draining", "The server is shutting down and takes no more questions.", retryAfter);
    case 408:
      return new ServerError("refused", "The server did not finish within its time limit.");
    case 413:
      return new ServerError("refused", "The conversation is longer than the server accepts. Start a new chat.");
  }
  if (response.status < 500) return new ServerError("refused", `The server refused the question: ${sentence(said)}`);
  return new ServerError("failed", `The server failed: ${sentence(said)}`);
}

function streamedError({ message, code }) {
  if (code === "shutting_down")
    return new ServerError("draining", "The server shut down before the answer was complete.");
  if (code === "deadline_exceeded")
    return new ServerError("refused", "The server did not finish within its time limit.");
  return new ServerError("failed", `The server failed: ${sentence(message)}`);
}

async function saidBy(response) {
  try {
    const { message, code } = (await response.json()).error;
    return { message, code };
  } catch {
    // A proxy in between answers as it likes.
    return { message: `status ${response.status}`, code: null };
  }
}

function sentence(text) {
  return /[.!?…]$/.test(text) ? text : `${text}.`;
}
