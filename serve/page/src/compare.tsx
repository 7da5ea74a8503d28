/** Turntables side by side, all seen from the same angle. */
import { useEffect, useRef, useState } from "preact/hooks";
import type { Particle } from "./api";
import { prefersStillness, useModal, useObjectUrl } from "./hooks";

export function Compare({ particles, onClose }: { particles: Particle[]; onClose: () => void }) {
  const dialog = useModal(onClose);
  const films = useRef(new Map<number, HTMLVideoElement>());
  const [angle, setAngle] = useState(0);
  const newest = useRef(angle);
  newest.current = angle;
  const [playing, setPlaying] = useState(!prefersStillness());

  // One clock for all: each film is put where the clock says, so none drifts, whatever their lengths.
  useEffect(() => {
    if (!playing) return;
    const timer = setInterval(() => setAngle((now) => (now + 3) % 360), 50);
    return () => clearInterval(timer);
  }, [playing]);
  useEffect(() => {
    for (const film of films.current.values()) place(film, angle);
  }, [angle]);

  return (
    <dialog ref={dialog} class="wide" aria-labelledby="compare-title">
      <div class="bar">
        <h2 id="compare-title">Side by side</h2>
        <button type="button" onClick={() => dialog.current?.close()}>
          Close
        </button>
      </div>
      <ul role="list" class="films">
        {particles.map((particle) => (
          <Film
            key={particle.index}
            particle={particle}
            ready={(film) => (films.current.set(particle.index, film), place(film, newest.current))}
          />
        ))}
      </ul>
      <div class="bar">
        <button type="button" aria-pressed={playing} onClick={() => setPlaying(!playing)}>
          Spin
        </button>
        <label class="angle">
          Angle
          <input
            type="range"
            min={0}
            max={359}
            value={angle}
            aria-valuetext={`${angle} degrees`}
            onInput={(event) => (setPlaying(false), setAngle(Number(event.currentTarget.value)))}
          />
        </label>
        <output class="hint">{angle}°</output>
      </div>
    </dialog>
  );
}

/** A film that is on its way is left alone; when it arrives it is placed again, for the angle may have moved on. */
function place(film: HTMLVideoElement, angleDeg: number): void {
  const time = (film.duration * angleDeg) / 360;
  if (film.readyState > 0 && !film.seeking && Math.abs(film.currentTime - time) > 1e-3) film.currentTime = time;
}

function Film({ particle, ready }: { particle: Particle; ready: (film: HTMLVideoElement) => void }) {
  const source = useObjectUrl(particle.turntable);
  return (
    <li>
      <div class={source ? "tile" : "tile mist"}>
        {source && (
          <video
            src={source}
            muted
            playsInline
            preload="auto"
            aria-label={`Turntable of particle ${particle.index}`}
            onLoadedMetadata={(event) => ready(event.currentTarget)}
            onSeeked={(event) => ready(event.currentTarget)}
          />
        )}
      </div>
      <span>Particle {particle.index}</span>
    </li>
  );
}
