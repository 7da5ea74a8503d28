/** What the bundle was built from, as one hash: tests/test_page.py compares it to see that serve/static is not stale. */
import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";

const OTHERS = ["index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.ts", "sources.ts"];

/** SHA-256 over "name\0contents\0" of every source, in the order of their names. */
export function hashOfSources(folder: string): string {
  const sources = readdirSync(`${folder}/src`, { recursive: true, encoding: "utf8" }).map((name) => `src/${name}`);
  const hash = createHash("sha256");
  for (const name of [...OTHERS, ...sources].sort()) {
    hash.update(`${name}\0`).update(readFileSync(`${folder}/${name}`)).update("\0");
  }
  return hash.digest("hex");
}
