"""Owns the serving terms the model can define, with their other names and their definitions.

Only text: how the definitions are asked for is in `topics.py`.
"""

from __future__ import annotations

DEFINITIONS: dict[tuple[str, ...], str] = {
    ("token", "tokens"): "A token is a piece of text, often a word or a part of a word, that a"
    " model reads and writes as one number.",
    ("tokenizer", "tokenization"): "A tokenizer turns text into token ids and token ids back into"
    " text. Each model comes with its own tokenizer.",
    ("KV cache", "key-value cache", "KV-cache"): "The KV cache holds the attention keys and values"
    " of every token seen so far. It lets each decode step compute only the newest token, and it"
    " is what fills the memory of a server under load.",
    ("prefill", "the prefill phase"): "Prefill is the first phase of a request: the model reads"
    " the whole prompt in parallel and fills the KV cache. It is limited by compute and it decides"
    " the time to first token.",
    ("decode", "the decode phase", "decoding"): "Decode is the second phase of a request: the"
    " model writes one token per step, each from all tokens before it. It is limited by memory"
    " bandwidth, so many requests share each step.",
    ("batch", "batching"): "A batch is a group of requests that go through the model together, so"
    " that its weights are read once for all of them.",
    ("continuous batching", "in-flight batching"): "Continuous batching lets requests join and"
    " leave the running batch at every step. No request waits for the slowest one in its batch,"
    " and the device stays busy.",
    ("chunked prefill", "prefill chunking"): "Chunked prefill splits a long prompt into pieces and"
    " runs each piece beside the decode steps of other requests, so that a long prompt does not"
    " stall their streams.",
    ("gateway", "API gateway"): "The gateway is the front door of the mesh. It speaks HTTP with"
    " clients, checks who they are, and passes their requests on over gRPC.",
    ("scheduler", "the request scheduler"): "The scheduler decides which request runs where and"
    " when. It keeps the queue, watches the free memory of every shard and shares them fairly.",
    ("shard", "model shard"): "A shard is a process that holds a model or a part of one and runs"
    " it. The scheduler sends it work and it streams tokens back.",
    ("gRPC",): "gRPC is a framework for remote procedure calls. It sends protobuf messages over"
    " HTTP/2 and supports streams in both directions.",
    ("protobuf", "protocol buffers"): "Protobuf is a compact binary format for messages whose"
    " fields are declared in a schema file. gRPC uses it on the wire.",
    ("latency",): "Latency is the time one request takes from being sent to being answered.",
    ("throughput",): "Throughput is the amount of work done per second, for example the number of"
    " tokens that a server writes per second for all requests together.",
    ("TTFT", "time to first token"): "TTFT is the time to first token: how long a user waits until"
    " the first piece of the answer appears. Queueing and prefill decide it.",
    ("TPOT", "time per output token", "inter-token latency"): "TPOT is the time per output token:"
    " the pause between one token of a stream and the next. Decode speed and batch size decide it.",
    ("prefix cache", "prefix caching"): "A prefix cache keeps the KV blocks of prompts already"
    " seen. A request that starts with the same tokens reuses them and skips that part of prefill.",
    ("semantic cache", "semantic caching"): "A semantic cache answers a request from an earlier"
    " one with nearly the same meaning. It compares embeddings, so the wording may differ.",
    ("quantization", "quantisation"): "Quantization stores weights with fewer bits, such as 8 or 4"
    " instead of 16. The model takes less memory and decodes faster, at a small loss of quality.",
    ("paged attention", "PagedAttention"): "Paged attention keeps the KV cache in blocks of fixed"
    " size that need not lie side by side. Memory is handed out block by block, so hardly any of"
    " it is wasted.",
    ("speculative decoding", "speculative sampling"): "Speculative decoding lets a small draft"
    " model guess several tokens that the large model then checks in one step. The output stays"
    " the same and comes faster.",
    ("draft model",): "A draft model is a small model that guesses the next tokens for a large one"
    " to check.",
    ("tensor parallelism", "tensor parallel"): "Tensor parallelism splits every weight matrix over"
    " several devices, which compute each layer together and exchange partial results.",
    ("pipeline parallelism", "pipeline parallel"): "Pipeline parallelism gives each device some of"
    " the layers of a model. Activations travel from one device to the next.",
    ("attention", "self-attention"): "Attention lets every token look at the tokens before it and"
    " take from them what it needs.",
    ("embedding", "embeddings"): "An embedding is a vector that stands for a token or a text."
    " Texts of like meaning get vectors that lie close together.",
    ("logits", "logit"): "Logits are the raw scores that a model gives to every token of its"
    " vocabulary. Softmax turns them into probabilities.",
    ("temperature", "sampling temperature"): "Temperature scales the logits before sampling. Zero"
    " always takes the most likely token; higher values make the output more varied.",
    ("top-p", "nucleus sampling", "top p"): "Top-p sampling draws from the smallest set of tokens"
    " whose probabilities add up to p.",
    ("greedy decoding", "greedy sampling"): "Greedy decoding takes the most likely token at every"
    " step, so the same prompt always gives the same answer.",
    ("streaming", "token streaming"): "Streaming sends every piece of the answer as soon as it is"
    " written, instead of the whole answer at the end.",
    ("backpressure", "back pressure"): "Backpressure tells a sender to slow down when the receiver"
    " cannot keep up, so that queues stay short.",
    ("load balancing", "load balancer"): "Load balancing spreads requests over several servers so"
    " that none is overloaded while another is idle.",
    ("preemption",): "Preemption takes a running request off the device to make room for another"
    " one. It is resumed later without losing what it has already written.",
    ("circuit breaker",): "A circuit breaker stops sending requests to a server that keeps"
    " failing, and tries it again after a pause.",
    ("rate limit", "rate limiting", "rate limiter"): "A rate limit caps how many requests or"
    " tokens a client may use in a given time.",
    ("context window", "context length"): "The context window is the largest number of tokens a"
    " model can look at, prompt and answer together.",
    ("chat template",): "A chat template turns a list of messages into the one text that the"
    " model was trained to continue.",
    ("inference",): "Inference means running a trained model to get answers from it. Training"
    " changes the weights; inference only reads them.",
    ("transformer", "transformer model"): "A transformer is a neural network built from layers of"
    " attention and feed-forward blocks. Most language models are transformers.",
    ("deadline", "gRPC deadline"): "A deadline is the moment after which a caller no longer wants"
    " the answer. It travels with the call, so every service can stop in time.",
    ("health check", "health checking"): "A health check asks a server whether it can take"
    " requests, so that traffic goes only to servers that can.",
    ("infermesh",): "infermesh serves foundation models as a mesh of gRPC services: a gateway in"
    " front, a scheduler in the middle and model shards that run the models.",
}
