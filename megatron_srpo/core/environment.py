"""Which environment variables a helper process inherits: an allow list without keys of other services."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

# What any program needs: where things are, which language, which libraries and threads.
NAMES = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "HOSTNAME",
    "VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "LD_LIBRARY_PATH", "LIBRARY_PATH", "SSL_CERT_FILE",
    "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "no_proxy", "NO_PROXY",
)  # fmt: skip
PREFIXES = ("LC_", "PYTHON", "XDG_", "OMP_", "MKL_", "KMP_", "OPENBLAS_", "GOMP_", "MALLOC_", "HF_", "TOKENIZERS_")
# A name with one of these words holds a secret, whatever its prefix is.
SECRET = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|API_?KEY|CREDENTIAL", re.IGNORECASE)


def unset_variables(key: str, named: Sequence[str]) -> list[str]:
    """A line about the variables that the setting `key` names and this process does not have; none if it has all."""
    unset = [name for name in named if name not in os.environ]
    if not unset:
        return []
    several = len(unset) > 1
    return [
        f"{key}: {', '.join(unset)} {'are' if several else 'is'} not set in this process, so nothing is passed on; "
        f"export {'them' if several else 'it'} where the run starts, or leave {'them' if several else 'it'} out"
    ]


def inherited(named: Sequence[str] = (), prefixes: Iterable[str] = ()) -> dict[str, str]:
    """The variables of this process that a helper inherits: those above, those whose name begins with one of
    `prefixes`, and those that the user has `named`. Names that look like a secret are inherited only if they are
    named."""
    starts = (*PREFIXES, *prefixes)
    return {
        name: value
        for name, value in os.environ.items()
        if name in named or (not SECRET.search(name) and (name in NAMES or name.startswith(starts)))
    }
