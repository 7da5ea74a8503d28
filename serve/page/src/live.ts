/** A generation as it changes: server-sent events by fetch, which unlike EventSource can carry a key; else polling. */
import { EventSourceParserStream } from "eventsource-parser/stream";
import { type Generation, getGeneration, hasEnded, Problem, request } from "./api";

const RETRY_S = 2;

/** Calls `changed` with every new state until the generation ends or `signal` aborts; `Problem` where it is refused. */
export async function watch(id: string, changed: (now: Generation) => void, signal: AbortSignal): Promise<void> {
  let lastEvent = "";
  for (;;) {
    const now = await tolerant(() => getGeneration(id, signal), signal);
    if (now) changed(now);
    if (now && hasEnded(now)) return;
    if (now) {
      await tolerant(async () => {
        const headers: Record<string, string> = { Accept: "text/event-stream" };
        if (lastEvent) headers["Last-Event-ID"] = lastEvent;
        const response = await request(now.links.events, { headers, signal, cache: "no-store" });
        const events = response.body!.pipeThrough(new TextDecoderStream()).pipeThrough(new EventSourceParserStream());
        const reader = events.getReader();
        for (let next = await reader.read(); !next.done; next = await reader.read()) {
          lastEvent = next.value.id ?? lastEvent;
          if (next.value.event === "generation") changed(JSON.parse(next.value.data) as Generation);
        }
      }, signal);
    }
    await pause(RETRY_S, signal);
  }
}

/** A broken connection or a service that restarts is waited out; a refusal is not. */
async function tolerant<T>(ask: () => Promise<T>, signal: AbortSignal): Promise<T | null> {
  try {
    return await ask();
  } catch (error) {
    signal.throwIfAborted();
    if (error instanceof Problem && error.status < 500 && error.status !== 429) throw error;
    return null;
  }
}

function pause(seconds: number, signal: AbortSignal): Promise<void> {
  return new Promise((done, stop) => {
    const timer = setTimeout(done, seconds * 1000);
    signal.addEventListener("abort", () => (clearTimeout(timer), stop(signal.reason)), { once: true });
  });
}
