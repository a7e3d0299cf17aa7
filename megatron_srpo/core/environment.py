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
