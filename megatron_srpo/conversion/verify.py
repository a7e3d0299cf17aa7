"""Whether two Hugging Face folders hold the same model, bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_srpo.bridge import BridgeError, read_config, weight_table
from megatron_srpo.bridge.load import IGNORED_SUFFIXES, WeightFolder, has_own_head
from megatron_srpo.bridge.rules import shape_of

HEAD = "lm_head.weight"


def differences(ours: Path, theirs: Path) -> list[str]:
    """A line for every tensor that is in one folder only, or has another dtype, shape or value; a tensor at a time.

    If the model is tied, a head in one folder only is no difference as long as it equals the embedding.
    """
    config = read_config(theirs)
    table = weight_table(config, config["vocab_size"])
    found = []
    with WeightFolder(ours) as mine, WeightFolder(theirs) as other:
        names = {name for name in other.names if not name.endswith(IGNORED_SUFFIXES)}
        held = set(mine.names)
        if table.shape.tied and not has_own_head(other, table) and not has_own_head(mine, table):
            names.discard(HEAD)
            held.discard(HEAD)
        found += [f"{name}: missing" for name in sorted(names - held)]
        found += [f"{name}: not in {theirs}" for name in sorted(held - names)]
        for name in sorted(held & names):
            a, b = mine.source(name), other.source(name)
            if (a.get_dtype(), shape_of(a)) != (b.get_dtype(), shape_of(b)):
                found.append(f"{name}: {a.get_dtype()} {shape_of(a)}, there {b.get_dtype()} {shape_of(b)}")
            elif not torch.equal(a[:].view(torch.uint8), b[:].view(torch.uint8)):
                found.append(f"{name}: other values, by at most {float((a[:].float() - b[:].float()).abs().max()):.3g}")
    return found


def require_equal(ours: Path, theirs: Path) -> None:
    """Raises BridgeError that names the first differences."""
    found = differences(ours, theirs)
    if found:
        more = "" if len(found) <= 5 else f"\n  … and {len(found) - 5} more"
        listed = "".join(f"\n  {line}" for line in found[:5])
        raise BridgeError(
            f"the converted model differs from {theirs} in {len(found)} tensor(s), and was not kept:{listed}{more}"
        )
