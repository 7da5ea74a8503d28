/** Small pieces of state that several parts of the page share. */
import { useEffect, useRef, useState } from "preact/hooks";
import { getBlob } from "./api";

/** Where the address says we are: "" is the front page, else the id of a generation. */
export function useRoute(): string {
  const [id, setId] = useState(readRoute());
  useEffect(() => {
    const changed = () => setId(readRoute());
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return id;
}

const readRoute = (): string => decodeURIComponent(/^#\/g\/([^/]+)$/.exec(location.hash)?.[1] ?? "");
export const hrefOf = (id: string): string => `#/g/${encodeURIComponent(id)}`;

/** A picture or film that may need a key, as an object URL; the old one stays until the new one is there.
 *
 * It is asked for again when `version` changes. Null while there is none.
 */
export function useObjectUrl(url: string | null, version: unknown = null): string | null {
  const [place, setPlace] = useState<string | null>(null);
  const last = useRef<string | null>(null);
  useEffect(() => {
    if (url === null) return;
    const stop = new AbortController();
    getBlob(url, stop.signal).then(
      (blob) => {
        if (stop.signal.aborted) return;
        if (last.current) URL.revokeObjectURL(last.current);
        last.current = URL.createObjectURL(blob);
        setPlace(last.current);
      },
      () => {}, // the next version, or the next visit, asks again
    );
    return () => stop.abort();
  }, [url, version]);
  useEffect(() => () => void (last.current && URL.revokeObjectURL(last.current)), []);
  return url === null ? null : place;
}

/** Puts a dialog on the screen for as long as its component lives; the browser keeps focus inside and returns it. */
export function useModal(onClose: () => void) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    const element = dialog.current!;
    element.showModal();
    element.addEventListener("close", onClose);
    return () => element.removeEventListener("close", onClose);
  }, []);
  return dialog;
}

export const prefersStillness = (): boolean => matchMedia("(prefers-reduced-motion: reduce)").matches;
