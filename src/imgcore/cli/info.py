"""``imgcore info``."""

from __future__ import annotations

from typing import Any

import click

from imgcore.cli.common import (
    cache_option,
    open_options,
    output_options,
    print_json,
    print_tree,
    size_text,
    verb,
    with_qemu_names,
)
from imgcore.cli.snapshot_list import print_snapshots
from imgcore.text import one_line


@verb("info")
@open_options(flags={"read_options": ("-o", "--read-options")})
@click.option("--backing-chain", is_flag=True, help="Describe the backing files as well.")
@cache_option("-t", "--cache")
@output_options
@click.argument("file")
def command(
    file: str,
    backing_chain: bool,
    opening: dict[str, Any],
    as_json: bool,
) -> None:
    """Describe the image FILE; only its headers are read."""
    from imgcore.verbs.info import info

    images = info(file, chain=True, **opening) if backing_chain else [info(file, **opening)]
    if as_json:
        named = [with_qemu_names(image) for image in images]
        print_json(named if backing_chain else named[0])
        return
    for index, image in enumerate(images):
        if index:
            click.echo()
        _print_human(image)


def _print_human(image: dict[str, Any]) -> None:
    from imgcore.sizes import format_size

    click.echo(f"image: {one_line(image['filename'])}")
    click.echo(f"file format: {image['format']}")
    click.echo(f"virtual size: {size_text(image['virtual-size'])}")
    click.echo(f"disk size: {format_size(image['actual-size'])}")
    if "cluster-size" in image:
        click.echo(f"cluster_size: {image['cluster-size']}")
    if image["dirty-flag"]:
        click.echo("cleanly shut down: no")
    if "backing-filename" in image:
        name, full = image["backing-filename"], image["full-backing-filename"]
        actual = "" if full == name else f" (actual path: {one_line(full)})"
        click.echo(f"backing file: {one_line(name)}{actual}")
    if "backing-filename-format" in image:
        click.echo(f"backing file format: {one_line(image['backing-filename-format'])}")
    if image.get("snapshots"):
        print_snapshots(image["snapshots"])
    if "format-specific" in image:
        click.echo("Format specific information:")
        print_tree(image["format-specific"]["data"], 4)
