"""One file a rule; each holds `RULE` and the function that finds it. Codes are stable and never reused.

GPU1xx where data lies and how it moves · GPU2xx number formats · GPU3xx how the model is written · GPU4xx kernels and shapes · GPU5xx compilers and backends · GPU6xx the machine · GPU7xx scripts
"""
