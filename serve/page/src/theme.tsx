/** Light or dark: as the system says until the person says otherwise. */
import { useEffect, useState } from "preact/hooks";

const KEY = "raydream-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

export function ThemeButton() {
  const [chosen, setChosen] = useState(localStorage.getItem(KEY));
  const [systemIsDark, setSystemIsDark] = useState(system.matches);
  const isDark = chosen ? chosen === "dark" : systemIsDark;

  useEffect(() => {
    const changed = () => setSystemIsDark(system.matches);
    system.addEventListener("change", changed);
    return () => system.removeEventListener("change", changed);
  }, []);
  useEffect(() => {
    if (!chosen) return;
    document.documentElement.dataset.theme = chosen;
    localStorage.setItem(KEY, chosen);
  }, [chosen]);

  return (
    <button type="button" class="quiet" aria-pressed={isDark} onClick={() => setChosen(isDark ? "light" : "dark")}>
      <svg class="glyph" viewBox="0 0 20 20" aria-hidden="true">
        <circle cx="10" cy="10" r="7" />
        <path class="filled" d="M10 3a7 7 0 0 1 0 14z" />
      </svg>
      Dark
    </button>
  );
}
