"""Triton's `worldmodel`: translates requests for services.worldmodel.serving."""

import numpy as np
import triton_python_backend_utils as pb_utils

from services.worldmodel import serving

INPUTS = ("start_frame", "prompt", "seed", "horizon", "steps", "guidance", "decode")


def refusal(error):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)[:1000], pb_utils.TritonError.INVALID_ARG))


class TritonPythonModel:
    def initialize(self, args):
        self.server = serving.load_worldmodel(serving.device_of(args["model_instance_kind"]))

    def execute(self, requests):
        responses = [None] * len(requests)
        calls = {}
        for i, request in enumerate(requests):
            inputs = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in INPUTS}
            try:
                calls[i] = serving.read_call(inputs, request.requested_output_names())
            except ValueError as error:
                responses[i] = refusal(error)
        for (i, call), answer in zip(calls.items(), self.server.run(list(calls.values())), strict=True):
            if isinstance(answer, ValueError):
                responses[i] = refusal(answer)
            elif isinstance(answer, Exception):  # not the caller's fault: an internal error, and the next call may work
                responses[i] = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer)[:1000]))
            else:
                tensors = [pb_utils.Tensor(k, np.ascontiguousarray(v)) for k, v in answer.items() if k in call.wants]
                responses[i] = pb_utils.InferenceResponse(tensors)
        return responses
