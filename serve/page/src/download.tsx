/** A link to a file. Where the service wants a key, which a link cannot carry, the page fetches the file itself. */
import type { ComponentChildren } from "preact";
import { useState } from "preact/hooks";
import { getBlob, hasKey } from "./api";

interface Props {
  url: string;
  name: string;
  opens?: boolean;
  label?: string;
  children: ComponentChildren;
}

export function Download({ url, name, opens, label, children }: Props) {
  const [problem, setProblem] = useState("");

  async function click(event: MouseEvent) {
    if (!hasKey()) return;
    event.preventDefault();
    setProblem("");
    try {
      const place = URL.createObjectURL(await getBlob(url));
      Object.assign(document.createElement("a"), { href: place, download: name }).click();
      setTimeout(() => URL.revokeObjectURL(place), 60_000); // when the browser has surely begun to save it
    } catch (error) {
      setProblem((error as Error).message);
    }
  }

  const place = opens ? { target: "_blank", rel: "noopener" } : { download: name };
  return (
    <>
      <a class="button" href={url} aria-label={label} onClick={click} {...place}>
        {children}
      </a>
      {problem && <span class="wrong">{problem}</span>}
    </>
  );
}
