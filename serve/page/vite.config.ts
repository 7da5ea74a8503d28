import { defineConfig } from "vite";
import { hashOfSources } from "./sources.ts";

export default defineConfig({
  base: "/static/",
  build: {
    outDir: "../static",
    emptyOutDir: true,
    assetsDir: "",
    assetsInlineLimit: 0, // the content security policy has no place for data: scripts, styles or icons
    modulePreload: { polyfill: false },
    license: { fileName: "licences.md" },
    target: "es2022",
    chunkSizeWarningLimit: 800, // three.js; it is loaded when a model is first turned
  },
  plugins: [
    {
      name: "hash-of-sources",
      generateBundle() {
        this.emitFile({ type: "asset", fileName: "sources.sha256", source: `${hashOfSources(import.meta.dirname)}\n` });
      },
    },
  ],
  server: { proxy: { "/v1": "http://127.0.0.1:8000" } },
});
