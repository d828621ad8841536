"""Casebooks: generated plain-English documents, the tasks over them, a small model and the role adapters trained on them.

lexicon, schema   words; kinds of entity, their attributes and every phrase that states or asks one
split             which name-value pairs are held out of training
generator         seed -> Casebook: facts and the text that states them
roles             what each role is asked about a casebook, and what it should answer
scoring           whether an answer is right
samples           the data API of training: (context_ids, branch_ids, is_answer)
tokenizer         text -> tokens, trained from the generator
assets            the shipped model, adapters, tasks and scores
"""
