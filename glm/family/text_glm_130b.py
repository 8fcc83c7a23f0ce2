"""How GLM-130B reads and writes text: ChatGLM-6B's vocabulary behind 20000 ids for images, and three kinds of blanks.

Source: the release's generation script. The text is closed by `</s>` unless a blank ends it; each stretch between
blanks is encoded by itself, and white space beside a blank stays. Nothing was trained on conversations.
"""

from dataclasses import replace

from glm.family.text_chatglm import CHATGLM
from glm.family.text_glm_10b import answer, prompt

GLM_130B = replace(
    CHATGLM,
    name="GLM-130B",
    parsed=("[MASK]", "[sMASK]", "[gMASK]"),
    parses=False,
    strips=False,
    stop=("<eop>", "</s>"),
    fills=("</s>", "<sop>"),
    prompt=prompt,
    answer=answer,
    blanks=("[MASK]", "[sMASK]", "[gMASK]"),
    open_ended=True,
)
