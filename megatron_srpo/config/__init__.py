from megatron_srpo.config.schema import *  # noqa
from megatron_srpo.config.schema import UserError, ConfigError, Config
