"""The Open Inference Protocol v2 over gRPC, on a port of its own beside HTTP.

messages   the protocol's messages, from `descriptors.binpb`, which `generate` makes of the two `.proto` files
head       what the server itself reads of a request: the model and the rows; the rest stays bytes
tensors    what a worker makes of the bytes: arrays, and of an answer a response
codes      one table: which gRPC code a status has
calls      which method means what
server     the port: limits, deadlines, cancellation, the drain
"""
