"""Documents in the order in which they answer a query.

The bundled model makes vectors, whose cosine is the score; it was trained to answer, so the order says little. With a
cross-encoder as `MODEL`, such as `cross-encoder/ms-marco-MiniLM-L6-v2`, query and document are read at once.
"""

from sensorium import LLM

MODEL = "demo"
QUERY = "Which shape is red?"
DOCUMENTS = ["There is a blue square.", "There is a red circle.", "The circle moves to the right."]

llm = LLM(MODEL, runner="pooling")
scores = [each.outputs.score for each in llm.score(QUERY, DOCUMENTS)]
for score, document in sorted(zip(scores, DOCUMENTS, strict=True), reverse=True):
    print(f"{score:6.3f}  {document}")
