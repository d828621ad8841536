"""``forkkv bench quality``: what each way to share a context costs an adapter in answers, tokens and KV, against ``isolated``.

policies   what is compared, in which cells (policy, writer, who came first)
samples    questions with their answers, from a file; casebook: generated ones
stats      intervals; comparison: a cell's outcomes beside those of ``isolated``; table, chart, html: rows for people
engine     the real engine, driven offline; recorder: K, V and hidden states read from it
run        all of it in order
"""
