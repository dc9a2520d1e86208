"""``trimtab serve``: an OpenAI-compatible HTTP server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def serve(
        models: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="MODEL[@TECHNIQUE+...]...",
                help="Model ids to serve, the first by default: smollm2-135m smollm2-135m@kivi:bits=4. Weights are shared.",
            ),
        ] = None,
        host: Annotated[
            str, typer.Option(help="Address to listen on; beyond this machine only with keys.")
        ] = "127.0.0.1",
        port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
        api_key_file: Annotated[
            Path | None, typer.Option(help="TOML file of hashed API keys and their limits.")
        ] = None,
        new_key: Annotated[
            str | None, typer.Option(metavar="NAME", help="Print a new API key and its entry for the file, and end.")
        ] = None,
        allow_anonymous: Annotated[
            bool, typer.Option("--allow-anonymous", help="Listen beyond this machine without keys.")
        ] = False,
        max_queue: Annotated[int, typer.Option(help="Requests waiting; more get 429.")] = 256,
        max_queue_tokens: Annotated[int, typer.Option(help="Prompt tokens waiting; more get 429.")] = 1 << 20,
        max_queue_seconds: Annotated[float, typer.Option(help="Longest wait before 429.")] = 60.0,
        max_prompt_tokens: Annotated[int, typer.Option(help="Longest prompt; 0 is what the model takes.")] = 0,
        max_body: Annotated[str, typer.Option(help="Longest request body.")] = "4MiB",
        max_headers: Annotated[str, typer.Option(help="Longest request line and headers.")] = "32KiB",
        max_connections: Annotated[int, typer.Option(help="Open connections; more are closed.")] = 1024,
        header_seconds: Annotated[float, typer.Option(help="Longest time to send headers.")] = 10.0,
        body_seconds: Annotated[float, typer.Option(help="Longest time to send a body.")] = 30.0,
        idle_seconds: Annotated[float, typer.Option(help="Longest time between requests of a connection.")] = 60.0,
        request_seconds: Annotated[float, typer.Option(help="Longest time of one request.")] = 600.0,
        slow_reader_seconds: Annotated[
            float, typer.Option(help="Longest time a stream may stand still for its reader.")
        ] = 30.0,
        stream_buffer: Annotated[
            str, typer.Option(help="Kept for one stream; half full, the request pauses.")
        ] = "256KiB",
        heartbeat_seconds: Annotated[float, typer.Option(help="Silence of a stream before a comment is sent.")] = 10.0,
        grace: Annotated[float, typer.Option(help="Seconds that open requests may go on after SIGTERM.")] = 30.0,
        threads: Annotated[int, typer.Option(help="Threads of the model; 0 is all this process may use.")] = 0,
        step_ms: Annotated[
            float, typer.Option(help="Longest step aimed at: how much prompt is mixed into decoding.")
        ] = 50.0,
        answer_ms: Annotated[
            float,
            typer.Option(
                help="Slowest step of answers alone: beyond it requests wait instead of slowing all; 0 is no limit."
            ),
        ] = 100.0,
        step_tokens: Annotated[int, typer.Option(help="Tokens of a step; 0 follows --step-ms.")] = 0,
        max_sequences: Annotated[int, typer.Option(help="Requests in one step; 0 is what fits.")] = 0,
        kv_bytes: Annotated[
            str,
            typer.Option(
                help="Room for keys and values, e.g. 2GiB; 0 is what full contexts need, at most half of what is free."
            ),
        ] = "0",
        dtype: Annotated[str, typer.Option(help="Weights: auto, file, float32, bfloat16 or float16.")] = "auto",
        kv_dtype: Annotated[
            str, typer.Option("--kv-dtype", help="Cache: float32, bfloat16, float16 or int8.")
        ] = "float32",
        isa: Annotated[str, typer.Option(help="Instruction set: auto, scalar, avx2, avx512.")] = "auto",
        prefix_cache: Annotated[
            bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Keep prompts for reuse within a key.")
        ] = True,
        fairness: Annotated[
            bool, typer.Option("--fairness/--no-fairness", help="Share tokens evenly among keys.")
        ] = True,
        deterministic: Annotated[
            bool, typer.Option("--deterministic", help="Answers do not depend on what else runs.")
        ] = False,
        tokenizer: Annotated[
            Path | None, typer.Option(help="Folder or .gguf file whose tokenizer replaces the model's.")
        ] = None,
    ) -> None:
        """Serve models over HTTP with OpenAI's interface, until SIGTERM.

        Endpoints are listed at /openapi.json; the explorer is at /ui/.

        Exit codes: 0 drained, 1 broke or stopped by a second signal, 2 could not start as asked.
        """
        import sys

        from trimtab.errors import MissingDependency
        from trimtab.units import parse_bytes

        try:
            from trimtab.serve.config import ServeConfig
            from trimtab.serve.keys import new_key as make_key
            from trimtab.serve.lifecycle import serve as run
            from trimtab.ui.explorer.handlers import routes_of
            from trimtab.ui.explorer.host import explorer_for
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("trimtab"):
                raise
            raise MissingDependency(f"serve needs {error.name}. Install it: pip install 'trimtab[serve]'") from None
        if new_key is not None:
            key, entry = make_key(new_key)
            print(f"The key, shown only now: {key}\nIts entry for the file:", file=sys.stderr)
            print(entry, end="")
            return
        config = ServeConfig(
            models=tuple(models or ()), tokenizer=tokenizer, host=host, port=port, api_key_file=api_key_file,
            allow_anonymous=allow_anonymous, max_queue=max_queue, max_queue_tokens=max_queue_tokens,
            max_queue_s=max_queue_seconds, max_prompt_tokens=max_prompt_tokens, max_body=parse_bytes(max_body),
            max_headers=parse_bytes(max_headers), max_connections=max_connections, header_s=header_seconds,
            body_s=body_seconds, idle_s=idle_seconds, request_s=request_seconds, slow_reader_s=slow_reader_seconds,
            stream_buffer=parse_bytes(stream_buffer), heartbeat_s=heartbeat_seconds, grace_s=grace, threads=threads,
            step_ms=step_ms, answer_ms=answer_ms, step_tokens=step_tokens, max_sequences=max_sequences, kv_bytes=parse_bytes(kv_bytes),
            dtype=dtype, kv_dtype=kv_dtype, isa=isa, prefix_cache=prefix_cache, fairness=fairness,
            deterministic=deterministic,
        )  # fmt: skip
        raise typer.Exit(run(config, routes=routes_of(explorer_for(config))))
