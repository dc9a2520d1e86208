import { defineConfig } from "vite";

// Names without hashes: the bundle is committed, and a changed byte should show as a changed file, not as another one.
export default defineConfig({
  base: "/ui/",
  build: {
    outDir: "../src/trimtab/ui/web",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: false,
    rollupOptions: {
      output: { entryFileNames: "app.js", assetFileNames: "app[extname]", codeSplitting: false },
    },
  },
});
