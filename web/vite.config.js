import { existsSync, readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { defineConfig } from "vite";

/** Write LICENSES.txt: of every package that has code in the bundle, as the package carries it. */
function licences() {
  const rule = "-".repeat(100);
  return {
    name: "licences",
    generateBundle(_, bundle) {
      const found = new Map();
      for (const chunk of Object.values(bundle)) {
        for (const [id, module] of Object.entries(chunk.modules ?? {})) {
          const place = id.replace(/^\0/, "").match(/^(.*node_modules\/((?:@[^/]+\/)?[^/]+))\//);
          if (place && module.renderedLength > 0) found.set(place[2], place[1]);
        }
      }
      const parts = [...found].sort(([a], [b]) => (a < b ? -1 : 1)).map(([name, folder]) => {
        const { version, license } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
        const file = readdirSync(folder).sort().find((each) => /^licen[cs]e/i.test(each));
        if (!file || !existsSync(join(folder, file))) throw new Error(`${name} carries no licence text`);
        return `${rule}\n${name} ${version} (${license})\n${rule}\n${readFileSync(join(folder, file), "utf8").trim()}\n`;
      });
      this.emitFile({ type: "asset", fileName: "LICENSES.txt", source: `Code of these packages is compiled into app.js.\n\n${parts.join("\n")}` });
    },
  };
}

// Names without hashes: the bundle is committed, and a changed byte should show as a changed file, not as another one.
export default defineConfig({
  base: "/ui/",
  plugins: [licences()],
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
