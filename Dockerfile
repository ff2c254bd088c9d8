# docker build --tag syncrec-trainer .                            for CPUs
# docker build --tag syncrec-trainer --build-arg DEVICE=cuda .    for NVIDIA GPUs
# docker run --gpus all --shm-size 16g --volume /shared:/shared syncrec-trainer \
#     train --config default data=/shared/data/shop run=/shared/runs/1
#
# It builds from the repository and PyPI alone. CUDA's libraries come with torch; the host has the
# driver, which NVIDIA's container toolkit brings in.
FROM python:3.11-slim-bookworm

# Kernels for CPUs are compiled for the processor at hand, here and where it is another one.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/syncrec-trainer
COPY . .

# cpu or cuda. TORCH_INDEX_URL: see launch/stack.py.
ARG DEVICE=cpu
ARG TORCH_INDEX_URL
RUN PIP_NO_CACHE_DIR=1 python launch/stack.py install "--$DEVICE"

ENTRYPOINT ["syncrec"]
CMD ["--help"]
