"""`label` and `cluster` over a Ray cluster: files streamed, models in actors, Parquet out.

Ray Data reads, schedules, retries and spills; what is here says what is done with a block. Every
result is a function of the rows alone, whatever their order and however they are cut into blocks,
so a run on a cluster ends with what one machine would have written.
"""
