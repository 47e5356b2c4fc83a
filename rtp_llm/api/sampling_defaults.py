"""Default sampling parameters: those that the model's authors recommend in generation_config.json."""

import json
import logging
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rtp_llm import files
from rtp_llm.config import Config
from rtp_llm.errors import ConfigError

log = logging.getLogger(__name__)

FILE_NAME = "generation_config.json"
MAX_BYTES = 1 << 20


class SamplingDefaults(BaseModel):
    """The fields of generation_config.json (transformers' GenerationConfig) that vLLM also uses as defaults.

    `do_sample` matters only if the file sets it to false. If it is absent, transformers assumes false; this server,
    like vLLM, samples.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    do_sample: bool | None = None
    temperature: float | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    max_new_tokens: int | None = Field(None, ge=1, lt=2**31)

    @property
    def default_temperature(self) -> float | None:
        return 0.0 if self.do_sample is False else self.temperature

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """Reads generation_config.json from the checkpoint, or from GENERATION_CONFIG_PATH, and logs its values.
        Without the file, or with GENERATION_CONFIG=none, no default is set.

        Raises ConfigError if the file is invalid, or if GENERATION_CONFIG_PATH does not exist.
        """
        if config.generation_config == "none":
            return cls.model_validate({})
        path = Path(config.generation_config_path or config.checkpoint_path)
        path = path / FILE_NAME if path.is_dir() else path
        if not config.generation_config_path and not path.is_file():
            return cls.model_validate({})
        defaults = cls._read(path)
        values = defaults.model_dump(exclude_none=True)
        if values:
            log.info("sampling defaults from %s (GENERATION_CONFIG=none disables them): %s", path, values)
        return defaults

    @classmethod
    def _read(cls, path: Path) -> Self:
        try:
            data: Any = json.loads(files.read(path, MAX_BYTES))
            return cls.model_validate(data)
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        except ValidationError as error:
            first = error.errors()[0]
            problem = f"{'.'.join(str(p) for p in first['loc']) or 'the file'}: {first['msg']}"
        except (ValueError, RecursionError) as error:
            problem = f"is not valid JSON ({error})"
        raise ConfigError(
            f"{path}: {problem}; fix the file, set GENERATION_CONFIG_PATH to another one, or set GENERATION_CONFIG=none"
        )
