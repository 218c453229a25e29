"""From rows of conversations to batches of tokens.

The way is one-directional: rows → `Conversation` → `Example` → packs → `PackedBatch`. The package owns
reading, encoding, packing and the order of the data. It knows no ranks beyond plain numbers handed to it, no
configuration system, no model and no trainer.
"""

from data.batch import PackedBatch
from data.chatml import Example
from data.conversation import Conversation, Message
from data.errors import DataError
from data.tokenizer import Tokenizer

__all__ = ["Conversation", "DataError", "Example", "Message", "PackedBatch", "Tokenizer"]
