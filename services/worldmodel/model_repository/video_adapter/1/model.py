"""Triton's `video_adapter`: translates requests for services.worldmodel.serving."""

import numpy as np
import triton_python_backend_utils as pb_utils

from services.worldmodel import serving


class TritonPythonModel:
    def initialize(self, args):
        self.server = serving.load_video_adapter(serving.device_of(args["model_instance_kind"]))

    def execute(self, requests):
        batches = [pb_utils.get_input_tensor_by_name(request, "latents").as_numpy() for request in requests]
        responses = []
        for request, answer in zip(requests, self.server.run(batches), strict=True):
            if isinstance(answer, ValueError):
                error = pb_utils.TritonError(str(answer)[:1000], pb_utils.TritonError.INVALID_ARG)
                responses.append(pb_utils.InferenceResponse(error=error))
                continue
            wanted = request.requested_output_names()
            tensors = [pb_utils.Tensor(k, np.ascontiguousarray(v)) for k, v in answer.items() if k in wanted]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses
