/**
 * Server-sent events out of a response's body.
 */

/**
 * @param {ReadableStream<Uint8Array>} body
 * @yields {string} each event's data; comments, by which servers keep connections alive, are left out
 */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((each) => each.replace(/\r$/, ""))) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(5).replace(/^ /, ""));
        }
      }
    }
  } finally {
    // Whoever stops reading wants no more: the connection is closed.
    await reader.cancel().catch(() => {});
  }
}
