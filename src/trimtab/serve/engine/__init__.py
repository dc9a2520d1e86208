"""The engine process: models, their schedulers, and the loop between them. The front starts `trimtab.serve.engine.main`."""
