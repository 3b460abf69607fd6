"""`evertune federated`: rounds over a network, through Flower."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Federated rounds over a network (academic; needs the extra 'federated').")

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    base: Annotated[str, typer.Option(help="The base model that all share.")] = "smollm2-135m",
) -> None:
    """Write a server's file and two clients', to be edited."""
    from evertune.flower.launch import write_examples

    for path in write_examples(folder, base):
        typer.echo(f"wrote {path}")
    typer.echo(f"next: evertune federated server {folder / 'server.yaml'}")


@app.command()
def server(
    file: Annotated[Path, typer.Argument(help="The server's file.")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 9092,
    certificates: Annotated[
        str, typer.Option(help="Files of the authority, the server's certificate and its key, with commas.")
    ] = "",
) -> None:
    """Wait for the clients, run the exchanges, and write one adapter; judge it with `evertune gate`."""
    from evertune.errors import RecipeError
    from evertune.flower.files import ServerFile
    from evertune.flower.launch import serve

    paths = [Path(one.strip()).absolute() for one in certificates.split(",")] if certificates else None
    if paths is not None and (len(paths) != 3 or not all(one.is_file() for one in paths)):
        raise RecipeError(f"--certificates: found {certificates!r}, expected three files: authority, certificate, key.")
    if paths is None and host not in LOOPBACK:
        raise RecipeError(
            f"--host: found {host} without certificates: updates would go over the network unencrypted.",
            remedy="Give --certificates, or listen at 127.0.0.1.",
        )
    made = serve(file, host=host, port=port, certificates=paths, say=typer.echo)
    typer.echo("academic: made by federated rounds, not production-validated")
    typer.echo(f"update: {made}\njudge it: evertune gate {ServerFile.read(file).checkpoint().path} {made}")


@app.command()
def client(
    file: Annotated[Path, typer.Argument(help="The client's file.")],
    address: Annotated[str, typer.Option("--server", help="The server's HOST:PORT.")] = "127.0.0.1:9092",
    authority: Annotated[
        Path | None, typer.Option(help="Certificate of the authority; needed but on loopback.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of this client's own processes.")] = 9094,
    seconds: Annotated[float | None, typer.Option(help="Leave after so long; Ctrl-C otherwise.")] = None,
) -> None:
    """Take part in a federation: train on the rows of this machine, and send updates only."""
    from evertune.errors import RecipeError
    from evertune.flower.launch import join

    if authority is None and address.rsplit(":", 1)[0] not in LOOPBACK:
        raise RecipeError(
            f"--server: found {address} without an authority: updates would go over the network unencrypted.",
            remedy="Give --authority.",
        )
    typer.echo(f"joining {address} as a client; what is sent are updates of an adapter, never rows")
    raise typer.Exit(join(file, server=address, authority=authority, port=port, seconds=seconds))
