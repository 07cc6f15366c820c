/**
 * When each phase of an answer began and ended, out of how long each took. All in seconds since the request was begun.
 */

/**
 * A span, or with `from` equal to `to` a moment.
 * @typedef {{name: string, kind: string, from: number, to: number, text: string}} Phase
 */

const NOTICED = 0.0005;
/** Of the time to the first token: less than this is in any answer, and says nothing. */
const OTHER_SHARE = 0.1;

/**
 * The rest of the time to the first token is planning, choosing the token, and the turns of other requests; those lie
 * between the phases, and are put behind them.
 *
 * @param {object} timings of the last chunk: queued, sharer_prefill, receiver_prefill, fuse, ttft (queued is not in it)
 *   and decode
 * @param {number} numTokens that were generated
 * @param {number} numSharers that read the prompt
 * @returns {Phase[]} what took time, in order
 */
export function phasesOf(timings, numTokens, numSharers) {
  const { queued, sharer_prefill: sharer, receiver_prefill: receiver, fuse, ttft, decode } = timings;
  const first = queued + ttft;
  // Spans that fit before the first token one after the other were computed so; else both models read at once.
  const inTurn = sharer + receiver + fuse <= ttft + NOTICED;
  const receiverFrom = queued + (inTurn ? sharer : 0);
  const fuseFrom = Math.min(Math.max(queued + sharer, receiverFrom + receiver), Math.max(queued, first - fuse));
  const spans = [
    span("Queue", "queue", 0, queued),
    span(numSharers > 1 ? "Sharers" : "Sharer", "sharer", queued, queued + sharer),
    span("Receiver", "receiver", receiverFrom, receiverFrom + receiver),
    span("Fuse", "fuse", fuseFrom, fuseFrom + fuse),
  ].filter((each) => each.to - each.from >= NOTICED);
  const other = span("Other work", "other", fuseFrom + fuse, first);
  if (other.to - other.from >= OTHER_SHARE * first) spans.push(other);
  spans.push({ name: "First token", kind: "first", from: first, to: first, text: seconds(first) });
  if (numTokens > 1) spans.push(span("Decode", "decode", first, first + decode));
  return spans;
}

/**
 * What can be said while an answer still comes.
 * @param {number} elapsed since the request was sent
 * @param {?number} first when the first text came, or null
 * @returns {Phase[]}
 */
export function phasesSoFar(elapsed, first) {
  if (first === null) return [span("Reading", "waiting", 0, elapsed)];
  return [
    span("Reading", "waiting", 0, first),
    { name: "First token", kind: "first", from: first, to: first, text: seconds(first) },
    span("Decode", "decode", first, elapsed),
  ];
}

/** @returns {string} such as "5.2 tokens/s", or "" where one token says nothing. */
export function speed(numTokens, decode) {
  if (numTokens < 2 || decode <= 0) return "";
  const rate = (numTokens - 1) / decode;
  return `${rate >= 100 ? Math.round(rate) : rate.toFixed(1)} tokens/s`;
}

/** @returns {string} such as "0.42 s" or "8 ms". */
export function seconds(value) {
  if (value < 0.0995) return `${Math.round(value * 1000)} ms`;
  return `${value < 9.995 ? value.toFixed(2) : value.toFixed(1)} s`;
}

/** @returns {number} the end of an axis that `last` fits on: one of few round numbers, so that it does not creep. */
export function axisEnd(last) {
  const power = 10 ** Math.floor(Math.log10(Math.max(last, 0.01)));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((each) => each * power).find((each) => each >= last * 0.999);
}

/** @returns {string} the end of an axis, such as "1.5 s" or "80 ms". */
export function axisText(end) {
  return end < 0.1 ? `${Math.round(end * 1000)} ms` : `${Number(end.toPrecision(2))} s`;
}

function span(name, kind, from, to) {
  return { name, kind, from, to, text: seconds(to - from) };
}
