// Asking the server beside the page: one JSON answer, or a stream of events line by line. A question can be taken back.
"use strict";

const UNREACHABLE = "The server does not answer. Is saekit serve still running?";

/** Posts a question. Rejects with the server's own words, or with an AbortError when `signal` takes it back. */
async function post(path, question, signal) {
  const request = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question), signal };
  const answer = await fetch(path, request).catch(unreachable);
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Error(said.error ?? `The server answered ${answer.status} and did not say why.`);
}

function unreachable(error) {
  throw error.name === "AbortError" ? error : new Error(UNREACHABLE);
}

/** The answer to a question. */
const ask = async (path, question, signal) => (await post(path, question, signal)).json();

/** The events of an answer as they come. An event "error" is thrown, and so is an end before "done". */
async function* askStream(path, question, signal) {
  const answer = await post(path, question, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", last = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(unreachable);
      const lines = (rest + (value ?? "")).split("\n");
      rest = done ? "" : lines.pop();
      for (const line of lines.filter((text) => text.trim())) {
        const event = JSON.parse(line);
        if (event.event === "error") throw new Error(event.error);
        last = event.event;
        yield event;
      }
      if (!done) continue;
      if (last !== "done") throw new Error("The server stopped before it was done.");
      return;
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever leaves early ends the answer; one that has ended cannot be
  }
}

/** Runs one task at a time: starting the next takes the earlier one back. `start(task)` gives the task a signal, and is
 *  true when the task ended by itself; `stop()` takes it back; `busy()` while one runs. */
function oneAtATime() {
  let current = null;
  const stop = () => current?.abort();
  async function start(task) {
    stop();
    const mine = (current = new AbortController());
    try {
      await task(mine.signal);
      return !mine.signal.aborted;
    } catch (error) {
      if (mine.signal.aborted) return false;
      throw error;
    } finally {
      if (current === mine) current = null;
    }
  }
  return { start, stop, busy: () => current !== null };
}

/** A function that calls `work` once nothing has called it for so many milliseconds; `cancel()` forgets the call. */
function debounced(work, milliseconds) {
  let timer = null;
  const cancel = () => clearTimeout(timer);
  const later = () => {
    cancel();
    timer = setTimeout(work, milliseconds);
  };
  return Object.assign(later, { cancel });
}
