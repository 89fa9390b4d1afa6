"""A few greedy questions: meshes that compute the same answer them alike."""

from tests.e2e.mesh_process import Mesh

QUESTIONS = (
    "What is the capital of France?",
    "What colour is the sky?",
    "How many legs has a dog?",
)


def answers(mesh: Mesh) -> list[str | None]:
    client = mesh.openai()
    given = []
    for question in QUESTIONS:
        done = client.chat.completions.create(
            model=mesh.model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=64,
        )
        given.append(done.choices[0].message.content)
    return given
