/** Everything that was made, newest first. */
import { useEffect, useRef, useState } from "preact/hooks";
import { type Generation, getGenerations, hasEnded } from "./api";
import { percent, status } from "./format";
import { hrefOf, useObjectUrl } from "./hooks";

const REFRESH_S = 5;
const NUM_ON_COVER = 4;

export function Gallery() {
  const [items, setItems] = useState<Generation[] | null>(null);
  const [cursor, setCursor] = useState<string | null>(null);
  const [problem, setProblem] = useState("");
  const [asking, setAsking] = useState(false);
  const pages = useRef(1);

  async function load(numPages: number) {
    const found: Generation[] = [];
    let next: string | null = null;
    for (let page = 0; page < numPages && (page === 0 || next !== null); page++) {
      const answer = await getGenerations(next);
      found.push(...answer.items);
      next = answer.next_cursor;
    }
    setItems(found);
    setCursor(next);
    setProblem("");
  }

  useEffect(() => {
    load(1).catch((error: Error) => setProblem(error.message));
  }, []);
  const busy = items?.some((item) => !hasEnded(item)) ?? problem !== "";
  useEffect(() => {
    if (!busy) return;
    const timer = setInterval(() => {
      if (!document.hidden) load(pages.current).catch((error: Error) => setProblem(error.message));
    }, REFRESH_S * 1000);
    return () => clearInterval(timer);
  }, [busy]);

  async function more() {
    setAsking(true);
    pages.current += 1;
    await load(pages.current).catch((error: Error) => setProblem(error.message));
    setAsking(false);
  }

  return (
    <section class="gallery" aria-labelledby="made">
      <h2 id="made">Made here</h2>
      {problem && <p class="wrong">The gallery cannot be read at the moment: {problem}</p>}
      {items?.length === 0 && <p class="hint">Nothing yet. The first one is yours.</p>}
      <ul role="list" class="covers">
        {items?.map((item) => (
          <li key={item.id}>
            <Cover generation={item} />
          </li>
        ))}
      </ul>
      {cursor !== null && (
        <button type="button" disabled={asking} onClick={more}>
          Show more
        </button>
      )}
    </section>
  );
}

function Cover({ generation }: { generation: Generation }) {
  const shown = generation.particles.slice(0, generation.n < NUM_ON_COVER ? 1 : NUM_ON_COVER);
  return (
    <a class="cover" href={hrefOf(generation.id)}>
      <span class={shown.length > 1 ? "mosaic" : "mosaic single"} aria-hidden="true">
        {shown.map((particle) => (
          <Tile key={particle.index} url={particle.preview} version={generation.preview_step ?? generation.state} />
        ))}
      </span>
      <strong>{generation.prompt}</strong>
      <span class="hint">
        {generation.n} {generation.n === 1 ? "model" : "models"} · {status(generation)}
      </span>
      {generation.state === "running" && <progress max={100} value={percent(generation)} aria-hidden="true" />}
    </a>
  );
}

function Tile({ url, version }: { url: string | null; version: unknown }) {
  const place = useObjectUrl(url, version);
  return <span class="tile">{place && <img src={place} alt="" />}</span>;
}
