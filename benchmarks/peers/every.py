"""Every peer, by its name."""

from benchmarks.peers import llama_cpp, openvino_genai, transformers_generate, vllm_cpu
from benchmarks.peers.peer import Peer

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        transformers_generate.PEER,
        vllm_cpu.PEER,
        openvino_genai.PEER,
        llama_cpp.PEER,
    )
}
