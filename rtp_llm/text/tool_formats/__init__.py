"""The formats in which models write tool calls, one module per format."""

from rtp_llm.text.tool_formats.hermes import HermesFormat
from rtp_llm.text.tool_formats.llama3_json import Llama3JsonFormat
from rtp_llm.text.tool_formats.mistral import MistralFormat
from rtp_llm.text.tool_formats.pythonic import PythonicFormat
from rtp_llm.text.tool_formats.qwen3_coder import Qwen3CoderFormat
from rtp_llm.text.tool_formats.tool_format import ToolFormat

# In the order in which `detect` asks them.
_FORMATS = (MistralFormat(), Qwen3CoderFormat(), PythonicFormat(), Llama3JsonFormat(), HermesFormat())
TOOL_FORMATS: dict[str, ToolFormat] = {tool_format.name: tool_format for tool_format in _FORMATS}


def detect(template: str) -> ToolFormat | None:
    """Returns the tool call format that a chat template uses; None if it uses none of the supported formats."""
    plain = template.replace('\\"', '"')  # in Jinja's strings
    return next((tool_format for tool_format in _FORMATS if tool_format.is_used_by(plain)), None)
