"""`tandem kv`: what an operator wants of the block stores of a running deployment, over its HTTP API.

Exit code 1 when the deployment does not answer or refuses, when a store did not do its part, and when `verify` has
found corrupt blocks. No logic of its own: the routes are router/kv.py's.
"""

from __future__ import annotations

import urllib.parse
from typing import Annotated, Any

import typer
from rich.table import Table

from deploy.http_client import CALL_S, LOCAL, Key, Url, ask
from deploy.terminal import console, fail, print_wide

WALK_S = 3_600.0  # verify reads every byte of every store
MIB = 2**20

app = typer.Typer(no_args_is_help=True, help="Look at the block stores of a running deployment, pin, drop and verify.")
Text = Annotated[str, typer.Argument(help="beginning of the prompt")]
System = Annotated[bool, typer.Option("--system", help="TEXT is the system message of chats, not a plain prompt")]
Salt = Annotated[str, typer.Option(help="cache_salt of the requests that are meant")]
Tenant = Annotated[str, typer.Option(help="one tenant, as `tandem kv stats` names it [default: all]")]


@app.command()
def stats(url: Url = LOCAL, key: Key = "") -> None:
    """How full the tiers are, and every store's own account."""
    state = ask(url, "GET", "/kv", key)
    console.print(_tier_table(state["tiers"]))
    print_wide(_store_table(state["stores"]))
    if index := state["index"]:
        console.print(f"index: {index['blocks']} blocks, {index['gaps_total']} gaps, {index['behind_s']:.1f} s behind")
    console.print(f"tenants: {', '.join(state['tenants'])}", soft_wrap=True)
    _complain([{**store, "error": "no answer"} for store in state["stores"] if not store["answers"]])


@app.command()
def ls(
    prefix: Annotated[str, typer.Argument(help="first hexadecimal digits of the hash")] = "",
    limit: Annotated[int, typer.Option(min=1, max=4096)] = 100,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """List blocks by hash."""
    query = urllib.parse.urlencode({"prefix": prefix, "limit": limit})
    answer = ask(url, "GET", f"/kv/blocks?{query}", key)
    table = Table("hash", "parent", "tokens", "store", "tier", "users", "tenant", title="blocks")
    table.columns[0].no_wrap = True  # to be pasted
    for b in answer["blocks"]:
        tier = b["tier"] + (", pinned" if b["pinned"] else "")
        row = (b["hash"], b["parent"][:12], str(b["tokens"]), b["store"], tier, str(b["holders"]), b["tenant"])
        table.add_row(*row)
    print_wide(table)
    _complain(answer["stores"])


@app.command()
def pin(
    text: Text, system: System = False, cache_salt: Salt = "", tenant: Tenant = "", url: Url = LOCAL, key: Key = ""
) -> None:
    """Keep a prompt's blocks longest, also those that no store has yet."""
    _count("pin", "pinned", _prompt(text, system, cache_salt, tenant), url, key)


@app.command()
def unpin(
    text: Text, system: System = False, cache_salt: Salt = "", tenant: Tenant = "", url: Url = LOCAL, key: Key = ""
) -> None:
    """Evict a prompt's blocks like all others."""
    _count("unpin", "unpinned", _prompt(text, system, cache_salt, tenant), url, key)


@app.command()
def drop(
    text: Annotated[str | None, typer.Argument(help="beginning of the prompt")] = None,
    hash: Annotated[list[str] | None, typer.Option(help="a block's hash; may be repeated")] = None,
    all: Annotated[bool, typer.Option("--all", help="every block of every store")] = False,
    system: System = False,
    cache_salt: Salt = "",
    tenant: Tenant = "",
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Forget blocks in every tier, except those in use."""
    if (text is not None) + bool(hash) + all != 1:
        fail("say what to drop in one way: TEXT, --hash or --all")
    body = {"all": True} if all else {"hashes": hash} if hash else _prompt(text or "", system, cache_salt, tenant)
    _count("drop", "dropped", body, url, key)


@app.command()
def verify(url: Url = LOCAL, key: Key = "") -> None:
    """Recompute name and checksums of every block; corrupt ones are dropped, and the exit code is 1."""
    stores = ask(url, "POST", "/kv/verify", key, {}, WALK_S)["stores"]
    table = Table("store", "checked", "corrupt", title="verified")
    for store in stores:
        table.add_row(store["store"], str(store.get("checked", "")), str(store.get("corrupt", "no answer")))
    console.print(table)
    _complain(stores)
    if corrupt := sum(store["corrupt"] for store in stores):
        fail(f"{corrupt} blocks were corrupt and have been dropped; look at the memory and disks of their stores")


def _prompt(text: str, system: bool, cache_salt: str, tenant: str) -> dict[str, Any]:
    named = {"messages": [{"role": "system", "content": text}]} if system else {"prompt": text}
    return named | {k: v for k, v in {"cache_salt": cache_salt, "tenant": tenant}.items() if v}


def _count(verb: str, what: str, body: dict[str, Any], url: str, key: str) -> None:
    answer = ask(url, "POST", f"/kv/{verb}", key, body, WALK_S if "all" in body else CALL_S)
    of = f" of {answer['asked']}" if "asked" in answer else ""
    for store in answer["stores"]:
        if "error" not in store:
            console.print(f"{store['store']}: {store[what]}{of} blocks {what}")
    if not answer["stores"]:
        fail("this deployment has no block store")
    _complain(answer["stores"])


def _complain(stores: list[dict[str, Any]]) -> None:
    """Fail when a store did not answer."""
    if errors := [f"{store['store']}: {store['error']}" for store in stores if "error" in store]:
        fail("; ".join(errors))


def _tier_table(tiers: dict[str, Any]) -> Table:
    table = Table("tier", "blocks", "MiB", "of MiB", "pinned blocks", title="tiers")
    for name in ("memory", "disk"):
        tier = tiers[name]
        sizes = [f"{tier[field] / MIB:.1f}" for field in ("bytes", "limit_bytes")]
        table.add_row(name, str(tier["blocks"]), *sizes, str(tier.get("pinned_blocks", "")))
    return table


def _store_table(stores: list[dict[str, Any]]) -> Table:
    counts = ("free", "reserved", "held", "cached", "quarantined", "disk_blocks")
    totals = ("evictions_total", "found_blocks_total", "missed_blocks_total", "corrupt_total")
    names = [name.removesuffix("_total").replace("_blocks", "") for name in (*counts, *totals)]
    table = Table("store", "node", *names, title="block stores")
    for store in stores:
        figures = [str(store[name]) for name in (*counts, *totals)] if store["answers"] else ["lost"]
        table.add_row(store["store"], store["node"], *figures)
    return table
