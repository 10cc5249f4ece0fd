"""Text in, batches out: sources, tokenizers, token files, sampling, batches."""

from onecard.data.batches import NO_TARGET, Batch, BlockSteps, gather_batch, heldout_batches, share_rows
from onecard.data.cache import cache_folder
from onecard.data.chats.conversation import Turn
from onecard.data.chats.corpus import ChatCorpus, ChatRequest, prepare_chats
from onecard.data.chats.survey import survey_chats
from onecard.data.chats.template import ChatTemplate
from onecard.data.corpus import Corpus, CorpusRequest, prepare, training_pieces
from onecard.data.sampler import BlockSampler, IndexSampler, heldout_blocks
from onecard.data.sources import Source, open_documents
from onecard.data.stream import BatchStream, StreamSettings
from onecard.data.survey import find_prepared, find_prepared_chats, survey
from onecard.data.text_files import Document
from onecard.data.token_file import TokenFile
from onecard.data.tokenizer import encode_pieces, separator_id, train_tokenizer, vocabulary_size
from onecard.data.tokenizer_files import load_tokenizer

TrainingData = Corpus | ChatCorpus

__all__ = [
    "NO_TARGET",
    "Batch",
    "BatchStream",
    "BlockSampler",
    "BlockSteps",
    "ChatCorpus",
    "ChatRequest",
    "ChatTemplate",
    "Corpus",
    "CorpusRequest",
    "Document",
    "IndexSampler",
    "Source",
    "StreamSettings",
    "TokenFile",
    "TrainingData",
    "Turn",
    "cache_folder",
    "encode_pieces",
    "find_prepared",
    "find_prepared_chats",
    "gather_batch",
    "heldout_batches",
    "heldout_blocks",
    "load_tokenizer",
    "open_documents",
    "prepare",
    "prepare_chats",
    "separator_id",
    "share_rows",
    "survey",
    "survey_chats",
    "train_tokenizer",
    "training_pieces",
    "vocabulary_size",
]
