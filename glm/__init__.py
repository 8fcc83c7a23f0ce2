"""The GLM family of language models in readable PyTorch.

    model = glm.GLM.from_pretrained("THUDM/chatglm3-6b")
    tok = glm.Tokenizer.from_pretrained("THUDM/chatglm3-6b")
    ids = tok.chat([{"role": "user", "content": "What is a general language model?"}])
    print(tok.decode(glm.generate(model, [ids], max_new_tokens=200, stop=tok.stop)[0]))

Shape letters, the same everywhere:

    B  rows of a batch               H  query heads            V  vocabulary
    T  tokens given in this call     G  groups of key heads    F  channels inside a feed-forward
    S  tokens seen: cached and new   K  channels of a head     L  layers
    D  width of the stream           A  position axes
"""
